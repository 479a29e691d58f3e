"""Distil the draft model from the base: `python -m reference.distill_draft --out FOLDER`.

The draft learns the base model's whole next-token distribution (Hinton et al. 2015), on the
same documents, by the forward divergence

    KL(p_base || p_draft) = sum_v p_base(v) (log p_base(v) - log p_draft(v))

which rewards the draft wherever the base puts probability: what speculative decoding accepts.
"""

import logging

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from reference import corpus
from reference.loop import Loss, train
from reference.train import new_model, parse, plan_from, token_streams


def forward_kl_from(teacher: torch.nn.Module) -> Loss:
    """The loss of a student [B, T] -> mean KL(teacher || student), nats per token."""

    def loss(student: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()
        logits = student(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()
        return torch.nn.functional.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    return loss


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    base = options.out / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    teacher = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    teacher.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    files, _ = corpus.split(corpus.library_files())
    streams = token_streams(tokenizer, files[: options.max_files])
    student = new_model(options.shape or "draft", tokenizer, seed=1)
    logging.info("student has %d parameters", student.num_parameters())
    train(student, tokenizer, streams, forward_kl_from(teacher), plan_from(options, "draft"))


if __name__ == "__main__":
    main()
