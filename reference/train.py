"""Train the base reference model: `python -m reference.train --out FOLDER --minutes 66`.

Writes FOLDER/base (an ordinary Hugging Face folder) and FOLDER/data (texts). Needs no network.
"""

import argparse
import json
import logging
import platform
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reference import corpus
from reference.loop import Plan, next_token_loss, train
from reference.tokenizer import train_tokenizer

CONTEXT = 512
SHAPES = {
    "base": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "draft": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smoke": {  # for the tests: seconds, not minutes
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


def new_model(shape: str, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights; layers start as the identity (output projections are 0)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape],
        head_dim=SHAPES[shape]["hidden_size"] // SHAPES[shape]["num_attention_heads"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def token_streams(
    tokenizer: PreTrainedTokenizerFast, files: list[corpus.SourceFile]
) -> list[list[int]]:
    """Token ids of every document and every chat, each from start token to end token."""
    eos = tokenizer.eos_token_id
    plain = tokenizer(list(corpus.documents(files)), verbose=False)["input_ids"]
    rendered = [
        f"<|user|>{turn.question}<|assistant|>{turn.answer}" for turn in corpus.chats(files)
    ]
    chats = tokenizer(rendered)["input_ids"]
    return [[*ids, eos] for ids in (*plain, *chats)]


def write_digests(files: list[corpus.SourceFile], held_out: list[str], folder: Path) -> None:
    """Name every training file with its sha256, and the files held out."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "held_out": held_out,
        "bytes": sum(len(file.text.encode()) for file in files),
        "python": platform.python_version(),
        "training_files": {file.path: file.sha256 for file in files},
    }
    path = folder / "training_files.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the training scripts; a run that resumes must repeat them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of base/, draft/, data/")
    parser.add_argument("--work", type=Path, default=Path("build/reference"), help="checkpoints")
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock limit")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--shape", choices=sorted(SHAPES), default=None)
    parser.add_argument("--max-files", type=int, default=None, help="use only some files")
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return options


def plan_from(options: argparse.Namespace, name: str) -> Plan:
    """Turn options into a plan; without --resume an older checkpoint is removed."""
    checkpoint = options.work / f"{name}.pt"
    if not options.resume:
        checkpoint.unlink(missing_ok=True)
    return Plan(
        limit_s=60 * options.minutes,
        model_folder=options.out / name,
        checkpoint=checkpoint,
        batch_size=options.batch_size,
        context=CONTEXT,
        max_steps=options.max_steps,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    shape = options.shape or "base"
    files, held_out = corpus.split(corpus.library_files())
    files = files[: options.max_files]
    corpus.write_texts(options.out / "data")
    write_digests(files, [file.path for file in held_out], options.out / "base")
    plan = plan_from(options, "base")
    if plan.checkpoint.exists():  # the ids must stay those that the weights were trained on
        tokenizer = AutoTokenizer.from_pretrained(plan.model_folder)
    else:
        texts = corpus.documents(files)
        tokenizer = train_tokenizer(texts, vocab_size=SHAPES[shape]["vocab_size"], context=CONTEXT)
    streams = token_streams(tokenizer, files)
    logging.info("%d documents, %d tokens", len(streams), sum(map(len, streams)))
    model = new_model(shape, tokenizer, seed=0)
    train(model, tokenizer, streams, next_token_loss, plan)


if __name__ == "__main__":
    main()
