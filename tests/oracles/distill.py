"""Distillation: tinkerbell-loss-distill."""

from __future__ import annotations

from torch import Tensor

from tests.oracles.form import Entry, Part, RecordValue, Tensors

ROWS = {"target_tokens": "target_tokens", "weights": "weights"}
TEACHER = {**ROWS, "teacher_logits": "teacher_logits"}
TOP = {
    "weights": "weights",
    "teacher_topk_ids": "teacher_topk_ids",
    "teacher_topk_logprobs": "teacher_topk_logprobs",
}


def _teacher_logprobs(tensors: Tensors) -> Tensor:
    """The log-probabilities of the sampled tokens under the logits of the teacher."""
    logprobs = tensors["teacher_logits"].log_softmax(-1)
    return logprobs.gather(-1, tensors["target_tokens"][..., None]).squeeze(-1)


MEAN = {"aggregation": "token-mean"}
SUM = {"aggregation": "sum"}
TEMPERATURE = {"temperature": RecordValue("temperature", default=1.0)}
JSD = {"beta": RecordValue("beta", float), **TEMPERATURE, **MEAN}
ALPHA = {"beta": RecordValue("distillation_alpha"), **SUM}
TOPK = {"k": RecordValue("topk"), **ALPHA}

MAPPING = [
    Entry("*", "gkd_jsd", "jsd", JSD, TEACHER),
    Entry(
        "liger-kernel",
        "jsd_hard_soft",
        "jsd",
        JSD,
        TEACHER,
        scale=lambda record: float(record["hyperparams"]["weight_soft_loss"]),
        plus=[Part("cross_entropy", RecordValue("weight_hard_loss"), MEAN)],
        note="Liger's hard and soft loss is a weighted sum with cross_entropy",
        where=lambda record: record["hyperparams"].get("temperature", 1.0) == 1.0,
    ),
    Entry("liger-kernel", "jsd_hard_soft", reason="different formula: Liger's hard loss also has the temperature"),
    Entry(
        "liger-kernel",
        "cosine_logits",
        "cosine_distance",
        MEAN,
        TEACHER,
        scale=lambda record: float(record["hyperparams"].get("beta", 1.0)),
    ),
    Entry(
        "torchtune",
        "kl_forward",
        "soft_cross_entropy",
        MEAN,
        TEACHER,
        note="the forward KL of torchtune omits the entropy of the teacher",
    ),
    Entry("torchtune", "kl_reverse", "reverse_kl", MEAN, TEACHER),
    Entry(
        "torchtune",
        "kl_symmetric",
        "soft_cross_entropy",
        MEAN,
        TEACHER,
        scale=lambda record: float(record["hyperparams"].get("sym_kd_ratio", 0.5)),
        plus=[Part("reverse_kl", RecordValue("sym_kd_ratio", lambda alpha: 1 - alpha, default=0.5), MEAN)],
        note="symmetric_kl without the entropy of the teacher",
    ),
    Entry("verl", "kl_forward_topk", "teacher_topk_partial_kl", SUM, TOP),
    Entry("twinkle", "gkd_topk", "teacher_topk_renormalised_jsd", {"beta": RecordValue("beta", float), **MEAN}, TOP),
    Entry("trl", "sdft_full", "jsd", ALPHA, TEACHER, note="TRL's distillation_alpha is beta"),
    Entry("trl", "sdft_topk_renorm", "student_topk_renormalised_jsd", TOPK, TEACHER),
    Entry("trl", "sdft_topk_tail", "student_topk_tail_jsd", TOPK, TEACHER),
    Entry("trl", "sdft_sampled_token", "sampled_reverse_kl", SUM, {**ROWS, "teacher_logprobs": _teacher_logprobs}),
    Entry(
        "trl",
        "iw_opd",
        "iw_opd",
        {"gamma": RecordValue("iw_opd_gamma"), **TEMPERATURE, **MEAN},
        {**ROWS, "teacher_logprobs": "teacher_logprobs", "logprobs": "logprobs"},
    ),
]
