"""InfoNCE: an anchor becomes nearer to its positive than to all other rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import aggregate_sequences, effective_mask, per_sequence
from tinkerbell_core.hyperparameters import above
from tinkerbell_loss_contrastive.pieces import Inputs, embeddings


@loss(coupling="batch", group_size=2, inputs=(), optional_inputs=("weights",), allowed={"temperature": above(0)})
def info_nce(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    temperature: float = 0.1,
    pooling: str = "last",
    normalize: bool = True,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log softmax of anchor * positive / temperature among all positives of the batch: InfoNCE (arXiv:1807.03748).

    Rows 2i are anchors, rows 2i + 1 their positives. An embedding is the hidden state at the last counted position, or
    with pooling "mean" the mean over the counted positions. normalize scales it to length 1.
    """
    roles = torch.arange(len(attention_mask), device=attention_mask.device) % 2
    groups = torch.arange(len(attention_mask), device=attention_mask.device) // 2
    mask = effective_mask(loss_fn_inputs, attention_mask)
    vectors = embeddings(model_outputs, mask, pooling, normalize)  # [B, H]
    return _contrast(vectors, mask, groups, roles, temperature, aggregation, in_batch=True)


@loss(
    coupling="batch",
    inputs=("group_ids", "roles"),
    optional_inputs=("weights",),
    allowed={"temperature": above(0)},
    example_inputs={"group_ids": torch.tensor([4, 4, 4, 9, 9, 9]), "roles": torch.tensor([0.0, 1, 2, 0, 1, 2])},
)
def info_nce_hard(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    temperature: float = 0.1,
    in_batch: bool = True,
    fake_negative_margin: float = -1.0,
    anchor_anchor: bool = False,
    positive_other: bool = False,
    pooling: str = "last",
    normalize: bool = True,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log softmax of anchor * positive / temperature, hard negatives among the others: InfoNCE (arXiv:1807.03748).

    roles: `[B]`, 0 for an anchor, 1 for a positive, 2 for a negative. group_ids: `[B]`, the group of each row. in_batch
    compares an anchor also with the rows of other groups, and anchor_anchor with their anchors (twinkle's include_qq).
    positive_other compares the first positive with all rows that are not anchors (twinkle's include_dd). If
    fake_negative_margin is at least 0, a negative is ignored as a probable positive if it is nearer to the anchor than
    the positive by more than the margin. An anchor without a positive has no loss. The diagnostic `anchors:sum` is the
    number of anchors with a positive.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)
    vectors = embeddings(model_outputs, mask, pooling, normalize)  # [B, H]
    return _contrast(
        vectors,
        mask,
        per_sequence("group_ids", loss_fn_inputs["group_ids"], mask),
        per_sequence("roles", loss_fn_inputs["roles"], mask),
        temperature,
        aggregation,
        in_batch=in_batch,
        fake_negative_margin=fake_negative_margin,
        anchor_anchor=anchor_anchor,
        positive_other=positive_other,
    )


def _contrast(
    vectors: Tensor,
    mask: Tensor,
    groups: Tensor,
    roles: Tensor,
    temperature: float,
    aggregation: str,
    *,
    in_batch: bool,
    fake_negative_margin: float = -1.0,
    anchor_anchor: bool = False,
    positive_other: bool = False,
) -> LossFnOutput:
    counts = (mask != 0).any(-1)  # [B]
    anchor, other = counts & (roles == 0), counts & (roles != 0)
    own = groups[:, None] == groups  # [B, B]
    positive = own & (counts & (roles == 1))
    rivals = other & (own | in_batch)  # [B, B]: the rows that a row is compared with
    if anchor_anchor:
        rivals = rivals | (anchor & ~own)
    anchors = anchor & positive.any(-1)  # [B]
    alike = vectors @ vectors.T  # [B, B]
    nearest = alike.masked_fill(~positive, -torch.inf).amax(-1, keepdim=True)  # [B, 1]
    if fake_negative_margin >= 0:
        rivals = rivals & (positive | (alike <= nearest + fake_negative_margin))
    scores, rivals, positive = alike[anchors] / temperature, rivals[anchors], positive[anchors]  # [A, B]
    compared = scores.masked_fill(~rivals, -torch.inf)  # [A, B]
    if positive_other:
        first = positive.float().argmax(-1)  # [A]
        apart = (own[first] | in_batch) & other & (torch.arange(len(mask), device=mask.device) != first[:, None])
        compared = torch.cat([compared, (alike[first] / temperature).masked_fill(~apart, -torch.inf)], -1)
    of_all = compared.logsumexp(-1)  # [A]
    of_positives = (scores * positive).sum(-1) / positive.sum(-1)
    per_anchor = of_all - of_positives
    with torch.no_grad():
        best = scores.masked_fill(~rivals, -torch.inf)
        found = positive.gather(-1, best.argmax(-1, keepdim=True)).float()
        diagnostics = {
            "anchors:sum": anchors.sum(),
            "accuracy": found.sum() / found.numel() if found.numel() else found.sum(),
            "positive_similarity": _mean(alike[anchors], positive),
            "negative_similarity": _mean(alike[anchors], rivals & ~positive),
        }
    per_row = torch.zeros(len(mask), dtype=vectors.dtype, device=vectors.device).masked_scatter(anchors, per_anchor)
    # all anchors, also those without a counted token; in a batch without anchors, all rows, each with a loss of 0
    meant = (roles == 0) | (roles != 0).all()  # [B]
    return LossFnOutput(aggregate_sequences(per_row[meant], anchors[meant], aggregation), None, diagnostics)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, 0.0).sum() / where.sum().clamp(min=1)
