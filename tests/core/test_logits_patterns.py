"""Common patterns of losses give the same value and gradient on lazy logits, and store nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from tests.core.naive import StoredSource
from tinkerbell_core import functional
from tinkerbell_core.logits import LocalSource, Logits

B, T, H, V, K = 3, 7, 5, 97, 4
Loss = Callable[[Tensor, Any], Tensor]


def inputs() -> Any:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (B, T), generator=g)
    mask = (torch.rand(B, T, generator=g) > 0.4).double()
    teacher = torch.randn(B, T, V, generator=g, dtype=torch.float64)
    return SimpleNamespace(
        targets=targets,
        several=torch.randint(V, (B, T, K), generator=g),
        mask=mask,
        labels=targets.masked_fill(mask == 0, -100),
        advantages=torch.randn(B, T, generator=g, dtype=torch.float64),
        old=-torch.rand(B, T, generator=g, dtype=torch.float64) - 4,
        teacher=teacher,
        teacher_logprobs=teacher.log_softmax(-1),
        teacher_probs=teacher.softmax(-1),
        frequencies=torch.rand(V, generator=g, dtype=torch.float64),
        temperature=torch.rand(B, T, 1, generator=g, dtype=torch.float64) + 0.5,
    )


PATTERNS: dict[str, Loss] = {}


def pattern(fn: Loss) -> Loss:
    PATTERNS[fn.__name__] = fn
    return fn


def several(**fns: Loss) -> None:
    PATTERNS.update(fns)


def chosen(logprobs: Tensor, d: Any) -> Tensor:
    return logprobs.gather(-1, d.targets.unsqueeze(-1)).squeeze(-1)


def policy(logprobs: Tensor, d: Any) -> Tensor:
    return -(logprobs * d.advantages * d.mask).sum()


# -- target log-probabilities

several(
    log_softmax_function_and_gather=lambda x, d: policy(chosen(F.log_softmax(x, dim=-1), d), d),
    log_softmax_of_torch=lambda x, d: policy(chosen(torch.log_softmax(x, dim=2), d), d),
    log_softmax_method=lambda x, d: policy(chosen(x.log_softmax(-1), d), d),
    log_softmax_of_special=lambda x, d: policy(chosen(torch.special.log_softmax(x, -1), d), d),
    log_softmax_module=lambda x, d: policy(chosen(torch.nn.LogSoftmax(-1)(x), d), d),
    log_softmax_with_its_own_dtype=lambda x, d: policy(chosen(x.log_softmax(-1, dtype=x.dtype), d), d),
    softmax_then_log=lambda x, d: policy(chosen(x.softmax(-1), d).log(), d),
    log_of_softmax=lambda x, d: policy(chosen(F.softmax(x, -1).log(), d), d),
    softmax_by_hand=lambda x, d: policy(chosen(_softmax_by_hand(x), d).log(), d),
    logits_minus_logsumexp=lambda x, d: policy(chosen(x - x.logsumexp(-1, keepdim=True), d), d),
    gathered_minus_logsumexp=lambda x, d: policy(chosen(x, d) - torch.logsumexp(x, dim=-1), d),
    take_along_dim=lambda x, d: policy(torch.take_along_dim(x.log_softmax(-1), d.targets[..., None], -1)[..., 0], d),
    take_along_dim_method=lambda x, d: policy(x.log_softmax(-1).take_along_dim(d.targets[..., None], dim=2)[..., 0], d),
    indexing_flat=lambda x, d: policy(
        F.log_softmax(x.reshape(-1, V), 1)[torch.arange(B * T), d.targets.flatten()].view(B, T), d
    ),
    indexing_whole=lambda x, d: policy(
        x.log_softmax(-1)[torch.arange(B)[:, None], torch.arange(T)[None], d.targets], d
    ),
    several_targets=lambda x, d: (x.log_softmax(-1).gather(-1, d.several) * d.mask[..., None]).sum(),
    one_token=lambda x, d: x.log_softmax(-1)[..., 11].sum() + x[:, -1, -3].sum(),
    yes_and_no=lambda x, d: (x[:, -1, [3, 5]].log_softmax(-1) * d.mask[:, :2]).sum(),
    a_few_columns=lambda x, d: x[..., 2:6].square().sum() + x.index_select(-1, torch.tensor([1, 9])).sum(),
    a_mask_of_columns=lambda x, d: x[..., torch.arange(V) < 3].square().sum(),
    functional_where=lambda x, d: policy(functional.target_logprobs(x, d.targets, where=d.mask), d),
    functional_several=lambda x, d: functional.target_logprobs(x, d.several, where=d.mask).square().sum(),
    functional_entropy=lambda x, d: functional.entropy(x, where=d.mask).square().sum(),
    functional_logsumexp=lambda x, d: functional.logsumexp(x, where=d.mask).square().sum(),
    ppo=lambda x, d: _ppo(chosen(x.log_softmax(-1), d), d),
    focal=lambda x, d: _focal(chosen(x.log_softmax(-1), d), d),
    trl_selective_log_softmax=lambda x, d: policy(_selective_log_softmax(x, d.targets), d),
    trl_selective_log_softmax_bf16=lambda x, d: policy(_selective_log_softmax_rows(x, d.targets), d),
)


def _softmax_by_hand(x: Tensor) -> Tensor:
    e = (x - x.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


def _ppo(logprobs: Tensor, d: Any) -> Tensor:
    ratio = (logprobs - d.old).exp()
    return -(torch.min(ratio * d.advantages, ratio.clamp(0.8, 1.2) * d.advantages) * d.mask).sum()


def _focal(logprobs: Tensor, d: Any) -> Tensor:
    return -(((1 - logprobs.exp()) ** 2) * logprobs * d.mask).sum()


def _selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    selected_logits = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
    logsumexp_values = torch.stack([torch.logsumexp(lg, dim=-1) for lg in logits])
    return selected_logits - logsumexp_values


def _selective_log_softmax_rows(logits: Tensor, index: Tensor) -> Tensor:
    found = []
    for row_logits, row_labels in zip(logits, index, strict=True):
        row_logprobs = F.log_softmax(row_logits, dim=-1)
        found.append(row_logprobs.gather(dim=-1, index=row_labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(found)


# -- cross-entropy

several(
    cross_entropy_flat=lambda x, d: F.cross_entropy(x.view(-1, x.size(-1)), d.labels.view(-1)),
    cross_entropy_ignore_index=lambda x, d: F.cross_entropy(
        x.flatten(0, 1), d.targets.masked_fill(d.mask == 0, 0).flatten(), ignore_index=0
    ),
    cross_entropy_shifted=lambda x, d: F.cross_entropy(
        x[:, :-1].contiguous().view(-1, V), d.labels[:, 1:].contiguous().view(-1), reduction="sum"
    ),
    cross_entropy_per_token=lambda x, d: policy(
        F.cross_entropy(x.view(-1, V), d.targets.view(-1), reduction="none").view(B, T), d
    ),
    cross_entropy_transposed=lambda x, d: policy(F.cross_entropy(x.transpose(1, 2), d.labels, reduction="none"), d),
    cross_entropy_permuted=lambda x, d: F.cross_entropy(x[..., :-1, :].permute(0, 2, 1), d.labels[:, 1:]),
    cross_entropy_weight=lambda x, d: F.cross_entropy(x.flatten(0, 1), d.labels.flatten(), weight=d.frequencies),
    cross_entropy_smoothed=lambda x, d: F.cross_entropy(x.flatten(0, 1), d.labels.flatten(), label_smoothing=0.1),
    cross_entropy_smoothed_and_weighted=lambda x, d: F.cross_entropy(
        x.flatten(0, 1), d.labels.flatten(), weight=d.frequencies, label_smoothing=0.1
    ),
    cross_entropy_smoothed_per_token=lambda x, d: policy(
        F.cross_entropy(x.mT, d.labels, label_smoothing=0.1, reduction="none"), d
    ),
    cross_entropy_soft=lambda x, d: F.cross_entropy(x.flatten(0, 1), d.teacher_probs.flatten(0, 1)),
    cross_entropy_soft_smoothed=lambda x, d: F.cross_entropy(
        x.flatten(0, 1), d.teacher_probs.flatten(0, 1), weight=d.frequencies, label_smoothing=0.2, reduction="sum"
    ),
    cross_entropy_soft_transposed=lambda x, d: policy(
        F.cross_entropy(x.transpose(1, 2), d.teacher_probs.transpose(1, 2), reduction="none"), d
    ),
    cross_entropy_module=lambda x, d: torch.nn.CrossEntropyLoss(reduction="sum")(x.flatten(0, 1), d.labels.flatten()),
    cross_entropy_of_one_sequence=lambda x, d: sum(F.cross_entropy(x[i], d.targets[i]) for i in range(B)),
    cross_entropy_of_one_position=lambda x, d: F.cross_entropy(x[0, 0], d.targets[0, 0]),
    cross_entropy_of_rows_that_count=lambda x, d: F.cross_entropy(x[d.mask.bool()], d.targets[d.mask.bool()]),
    cross_entropy_of_none=lambda x, d: F.cross_entropy(x.flatten(0, 1), torch.full((B * T,), -100), reduction="sum"),
    nll_loss=lambda x, d: F.nll_loss(F.log_softmax(x, -1).view(-1, V), d.labels.view(-1)),
    nll_loss_weighted=lambda x, d: F.nll_loss(
        x.log_softmax(-1).flatten(0, 1), d.labels.flatten(), weight=d.frequencies, reduction="sum"
    ),
    nll_loss_transposed=lambda x, d: policy(
        F.nll_loss(F.log_softmax(x.transpose(1, 2), 1), d.targets, reduction="none"), d
    ),
)

# -- entropy, logsumexp

several(
    entropy_of_probs_and_logprobs=lambda x, d: _masked(-(x.softmax(-1) * x.log_softmax(-1)).sum(-1), d),
    entropy_of_exp=lambda x, d: _masked(_entropy_of_exp(x), d),
    entropy_of_logsumexp=lambda x, d: _masked(torch.logsumexp(x, -1) - (F.softmax(x, -1) * x).sum(-1), d),
    entropy_of_everything=lambda x, d: -(x.log_softmax(-1) * x.softmax(-1)).sum() / x.shape[0],
    entropy_masked_before_its_sum=lambda x, d: (
        -(x.softmax(-1) * x.log_softmax(-1) * d.mask.unsqueeze(-1)).sum(dim=(1, 2)).square().sum()
    ),
    entropy_by_einsum=lambda x, d: _masked(torch.einsum("btv,btv->bt", x.softmax(-1), x.log_softmax(-1)), d),
    entropy_by_entr=lambda x, d: _masked(torch.special.entr(x.softmax(-1)).sum(-1), d),
    entropy_of_rows_that_count=lambda x, d: -(x.softmax(-1) * x.log_softmax(-1))[d.mask.bool()].sum(-1).square().sum(),
    entropy_from_normalised_logits=lambda x, d: _masked(_entropy_normalised(x), d),
    entropy_at_a_temperature=lambda x, d: _masked(-((x / 0.7).softmax(-1) * (x / 0.7).log_softmax(-1)).sum(-1), d),
    entropy_without_gradient=lambda x, d: policy(chosen(x.log_softmax(-1), d) * _entropy_no_grad(x), d),
    entropy_detached=lambda x, d: policy(chosen(x.log_softmax(-1), d) * _entropy_of_exp(x.detach()), d),
    categorical=lambda x, d: _categorical(Categorical(logits=x), d),
    categorical_with_temperature=lambda x, d: _categorical(Categorical(logits=x / 0.8), d),
    categorical_of_log_softmax=lambda x, d: _categorical(Categorical(logits=x.log_softmax(-1)), d),
    logsumexp_squared=lambda x, d: _masked(torch.logsumexp(x, dim=-1) ** 2, d),
    logsumexp_of_all=lambda x, d: x.logsumexp((1, 2)).square().sum(),
    z_loss=lambda x, d: (
        F.cross_entropy(x.flatten(0, 1), d.labels.flatten()) + 1e-2 * (x.logsumexp(-1).square() * d.mask).mean()
    ),
)


def _masked(x: Tensor, d: Any) -> Tensor:
    return (x.square() * d.mask).sum()


def _entropy_of_exp(x: Tensor) -> Tensor:
    logprobs = F.log_softmax(x, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def _entropy_normalised(x: Tensor) -> Tensor:
    logprobs = x - torch.logsumexp(x, dim=-1, keepdim=True)
    return -(torch.exp(logprobs) * logprobs).sum(dim=-1)


def _entropy_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return _entropy_of_exp(x)


def _categorical(policy: Categorical, d: Any) -> Tensor:
    return -(policy.log_prob(d.targets) * d.advantages).sum() - 0.1 * (policy.entropy() * d.mask).sum()


# -- temperature, casts, label smoothing by hand

several(
    temperature=lambda x, d: policy(chosen((x / 0.7).log_softmax(-1), d), d),
    temperature_as_a_scalar_tensor=lambda x, d: policy(chosen((x / torch.tensor(0.7)).log_softmax(-1), d), d),
    temperature_of_each_row=lambda x, d: policy(chosen((x / d.temperature).log_softmax(-1), d), d),
    temperature_of_each_sequence=lambda x, d: policy(chosen((x * d.temperature[:, :1]).log_softmax(-1), d), d),
    temperature_of_logprobs=lambda x, d: policy(chosen((x.log_softmax(-1) / 1.3).log_softmax(-1), d), d),
    temperature_below_zero=lambda x, d: policy(chosen((x * -2).log_softmax(-1), d), d),
    logsumexp_of_tempered_logprobs=lambda x, d: _masked((x.log_softmax(-1) / 1.3).logsumexp(-1), d),
    casts=lambda x, d: policy(
        chosen(x.double().to(torch.float64).to(x.device).to(d.mask).type_as(d.mask).cpu().contiguous().clone(), d), d
    ),
    a_mask_cast_to_the_logits=lambda x, d: (chosen(x.log_softmax(-1), d) * d.mask.bool().to(x)).sum(),
    added_numbers=lambda x, d: policy(chosen((1 - x + d.mask[..., None] - 2).log_softmax(-1), d), d),
    row_factor_with_a_gradient=lambda x, d: policy(chosen(x * chosen(x, d)[..., None] + 1, d), d),
    smoothing_by_mean=lambda x, d: -(0.9 * chosen(x.log_softmax(-1), d) + 0.1 * x.log_softmax(-1).mean(-1)).sum(),
    smoothing_by_sum=lambda x, d: policy(x.log_softmax(-1).sum(dim=-1) / V, d),
    rows_filled=lambda x, d: (
        policy(chosen(x.log_softmax(-1).masked_fill(d.mask[..., None] == 0, -1.0), d), d)
        + chosen(torch.where(d.mask.bool().unsqueeze(-1), x, 2.0).log_softmax(-1), d).square().sum()
    ),
    smoothing_of_weighted_rows=lambda x, d: (x.log_softmax(-1) * d.mask[..., None]).sum(),
    mean_of_logits=lambda x, d: x.mean() + x.sum(-1).square().sum() + x.mean((0, 2), keepdim=True).square().sum(),
    frequencies=lambda x, d: (
        (x.softmax(-1) @ d.frequencies).square().sum() + (x.log_softmax(-1) * d.frequencies).sum(-1).square().sum()
    ),
)

# -- given teachers

several(
    kl_div_to_probs=lambda x, d: F.kl_div(x.log_softmax(-1), d.teacher_probs, reduction="batchmean"),
    kl_div_to_logprobs=lambda x, d: F.kl_div(
        F.log_softmax(x, -1), d.teacher_logprobs, reduction="sum", log_target=True
    ),
    kl_div_per_token=lambda x, d: _masked(F.kl_div(F.log_softmax(x, -1), d.teacher_probs, reduction="none").sum(-1), d),
    kl_div_masked=lambda x, d: (
        F.kl_div(x.log_softmax(-1), d.teacher_logprobs, reduction="none", log_target=True) * d.mask[..., None]
    ).sum(),
    kl_div_with_zeros=lambda x, d: F.kl_div(
        x.log_softmax(-1), torch.eye(V, dtype=torch.float64)[d.targets], reduction="sum"
    ),
    kl_div_reverse=lambda x, d: F.kl_div(d.teacher_logprobs, x.log_softmax(-1), reduction="batchmean", log_target=True),
    kl_div_reverse_of_probs=lambda x, d: F.kl_div(d.teacher_logprobs, x.softmax(-1), reduction="sum"),
    kl_by_hand_forward=lambda x, d: _masked((d.teacher_probs * (d.teacher_logprobs - x.log_softmax(-1))).sum(-1), d),
    kl_by_hand_forward_split=lambda x, d: _masked(
        (d.teacher_probs * d.teacher_logprobs).sum(-1) - (d.teacher_probs * x.log_softmax(-1)).sum(-1), d
    ),
    kl_by_hand_reverse=lambda x, d: _masked(_kl_reverse(x, d.teacher_logprobs), d),
    kl_by_hand_reverse_from_logits=lambda x, d: _masked(_kl_reverse(x, F.log_softmax(d.teacher, -1)), d),
    kl_by_hand_reverse_with_softmax=lambda x, d: (
        (F.softmax(x, -1) * (F.log_softmax(x, -1) - d.teacher_logprobs)).sum(-1) * d.mask
    ).sum(),
    kl_at_a_temperature=lambda x, d: (
        F.kl_div((x / 2).log_softmax(-1), (d.teacher / 2).softmax(-1), reduction="batchmean") * 4
    ),
    soft_targets=lambda x, d: -(d.teacher_probs * x.log_softmax(-1)).sum(-1).mean(),
    one_hot=lambda x, d: -(F.one_hot(d.targets, V) * x.log_softmax(-1)).sum(-1).mean(),
    expected_reward=lambda x, d: (x.softmax(-1) * d.teacher).sum(-1).mul(d.mask).sum(),
    gkd=lambda x, d: F.kl_div(x.log_softmax(-1), d.teacher_logprobs, reduction="none", log_target=True)[
        d.mask.bool()
    ].sum(),
    kl_div_padding_filled=lambda x, d: (
        F.kl_div(x.log_softmax(-1), d.teacher_probs, reduction="none").masked_fill(d.mask[..., None] == 0, 0.0).sum()
    ),
    kl_of_impossible_tokens_under_the_mask=lambda x, d: torch.where(
        d.mask.bool()[..., None], _with_impossible(d) * (_with_impossible(d).log() - x.log_softmax(-1)), 0.0
    ).sum(),
    log_ratio_at_targets=lambda x, d: policy(chosen(x.log_softmax(-1) - d.teacher_logprobs, d), d),
)


def _with_impossible(d: Any) -> Tensor:
    return torch.where((d.mask[..., None] == 0) & (torch.arange(V) < 9), 0.0, d.teacher_probs)


def _kl_reverse(x: Tensor, teacher_logprobs: Tensor) -> Tensor:
    logprobs = x.log_softmax(-1)
    return (logprobs.exp() * (logprobs - teacher_logprobs)).sum(-1)


# -- the largest

several(
    accuracy=lambda x, d: (
        policy(chosen(x, d) * (x.argmax(-1) == d.targets), d)
        + (x.argmax(dim=-1, keepdim=True) * d.mask[..., None]).sum()
    ),
    largest=lambda x, d: x.max(-1).values.square().sum() + x.max(dim=-1)[0].sum() + x.max() + x.amax(-1).sum(),
    largest_unpacked=lambda x, d: _largest(*torch.max(x.log_softmax(-1), dim=-1)),
    smallest=lambda x, d: x.min(-1).values.square().sum() + x.amin(-1).sum() + x.min(),
    confidence=lambda x, d: x.softmax(-1).max(-1).values.square().sum(),
    top_k=lambda x, d: _masked(x.topk(5, dim=-1).values.logsumexp(-1) - x.logsumexp(-1), d),
    top_k_contains=lambda x, d: policy(chosen(x, d) * (torch.topk(x, 5).indices == d.targets[..., None]).any(-1), d),
    top_k_of_logprobs=lambda x, d: x.log_softmax(-1).topk(3).values.square().sum(),
    margin=lambda x, d: (x.topk(2).values @ torch.tensor([1.0, -1.0], dtype=torch.float64)).square().sum(),
)


def _largest(values: Tensor, columns: Tensor) -> Tensor:
    return (values * columns).sum()


# -- shapes

several(
    shifted=lambda x, d: (chosen(x.log_softmax(-1), d)[:, :-1] * chosen(x[:, 1:], _shifted(d))).sum(),
    masked_rows=lambda x, d: x[d.mask.bool()].log_softmax(-1)[:, 3].square().sum(),
    a_row=lambda x, d: x[0, 2].log_softmax(0)[3] + x[1].logsumexp(1).sum(),
    last_positions=lambda x, d: x[torch.arange(B), torch.tensor([3, 6, 1])].log_softmax(-1)[:, 5].sum(),
    halves=lambda x, d: sum((i + 1) * part.log_softmax(-1)[..., 7].sum() for i, part in enumerate(x.split([1, 2]))),
    chunks=lambda x, d: sum((i + 1) * part.logsumexp(-1).sum() for i, part in enumerate(x.chunk(3, dim=1))),
    pairs=lambda x, d: (x[0::2].logsumexp(-1)[0] - x[1::2].logsumexp(-1)).square().sum(),
    unbound=lambda x, d: sum((i + 1) * part.logsumexp(-1).sum() for i, part in enumerate(x.unbind(1))),
    iterated=lambda x, d: sum((i + 1) * row.logsumexp(-1).sum() for i, row in enumerate(x)),
    unsqueezed=lambda x, d: x.unsqueeze(0).squeeze(0)[:, None].log_softmax(-1).squeeze(1)[..., 3].square().sum(),
    expanded=lambda x, d: (x[:, None].expand(B, 2, T, V).logsumexp(-1) * torch.arange(1, 3)[:, None]).sum(),
    concatenated=lambda x, d: (torch.cat([x[1:], x[:1]]).logsumexp(-1) * d.mask).sum(),
    concatenated_at_temperatures=lambda x, d: (torch.cat([x[:1] / 2, x[1:]]).logsumexp(-1) * d.mask).sum(),
    stacked=lambda x, d: (torch.stack([x[0], x[1]]).log_softmax(-1).gather(-1, d.several[:2])).square().sum(),
    moved=lambda x, d: (x.permute(1, 0, 2).logsumexp(-1) * d.mask.t()).sum() + x.movedim(-1, 0).logsumexp(0).sum(),
    like=lambda x, d: chosen(x, d).sum() + torch.zeros_like(x).sum() + x.new_ones(2).sum(),
)


def _shifted(d: Any) -> Any:
    return SimpleNamespace(targets=d.targets[:, 1:])


@pytest.mark.parametrize("source", ["stored", "local"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_stores_nothing_and_gives_the_value_and_gradient_of_plain_logits(name: str, source: str) -> None:
    loss, d = PATTERNS[name], inputs()
    hidden, weight = states()
    expected = loss(hidden @ weight.t(), d)
    expected.backward()
    twin, _ = states()
    logits = lazy(twin, weight, source)
    found = loss(logits, d)
    found.backward()
    logits.check()
    assert logits.materialised == []
    assert type(found) is Tensor
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(twin.grad, hidden.grad, rtol=1e-9, atol=1e-10)


def states() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    return torch.randn(B, T, H, generator=g, dtype=torch.float64).requires_grad_(), weight


def lazy(hidden: Tensor, weight: Tensor, source: str) -> Logits:
    flat = hidden.flatten(0, 1)
    if source == "stored":
        return Logits.over(StoredSource(flat, weight), hidden.shape[:2])
    head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(weight)
    return Logits.over(LocalSource(flat, head, chunk_bytes=4 * V * 8), hidden.shape[:2])
