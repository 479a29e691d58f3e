"""The model card: true, loadable, and free of the machine's names."""

from __future__ import annotations

from typing import Any

from compressor.artifact.card import CardData, redact, render_card


def card(**changes: Any) -> str:
    values: dict[str, Any] = {
        "name": "llama-w4a16", "base_model": "org/llama", "licence": "apache-2.0",
        "command": "compress run /home/alice/w4a16.yaml", "version": "0.1.0",
        "schemes": [{"layers": "28 x mlp.*", "scheme": "W4A16 g128"}],
        "original_bytes": 2**30, "artifact_bytes": 2**28, "average_bits": 4.156,
        "calibration": "128 rows of 256 tokens, seed 0", "verdict": "pass",
        "metrics": {"num_tokens": 65000, "kl_mean": 0.029, "kl_mean_ci": [0.027, 0.031],
                    "top1_agreement": 0.93, "top1_agreement_ci": [None, None]},
        "tasks": {"mc": {"num_items": 400, "base_accuracy": 0.7, "accuracy": 0.69,
                         "delta_ci": [-0.02, 0.01], "lost": 5, "won": 1}},
    }  # fmt: skip
    return render_card(CardData(**(values | changes)))


def test_the_card_tells_what_was_measured() -> None:
    text = card()
    assert "| KL divergence, mean (nats) | 0.02900 | 0.02700 … 0.03100 |" in text
    assert "| 28 x mlp.\\* | W4A16 g128 |" in text
    assert "256.00 MiB | 0.250" in text
    assert 'base_model: "org/llama"' in text
    assert "-2.00% … +1.00%" in text


def test_the_card_says_how_to_load_it_in_three_ways() -> None:
    for line in ("from_pretrained(", "vllm serve", "compress serve"):
        assert line in card()


def test_what_was_not_measured_is_said() -> None:
    text = card(metrics={}, tasks={}, licence="")
    assert "Not measured." in text
    assert "No downstream task was measured." in text
    assert "states none" in text


def test_a_folder_is_no_hub_id_in_the_front_matter() -> None:
    text = card(base_model="/home/alice/models/llama")
    assert "base_model:" not in text
    assert "alice" not in text
    assert "**llama**" in text


def test_hostile_names_cannot_add_markup() -> None:
    text = card(name="a\n# b <script>|`", limitations=["x\n---\n<img>"])
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\n# b" not in text
    assert "\n---\n<img" not in text


def test_paths_and_tokens_are_redacted_and_other_texts_are_not(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {
        "/home/alice/models/llama": "llama",
        "see /mnt/disk/bob/x.yaml: line 3": "see x.yaml: line 3",
        "path:/Users/carol": "path:~",
        "C:\\Users\\dave\\out": "out",
        "file:///home/erin/x": "x",
        f"{tmp_path}/runs/one": "runs/one",
        "hf_abcdefgh and https://user:pw@host/a/b": "*** and https://***@host/a/b",
        "https://huggingface.co/org/name": "https://huggingface.co/org/name",
        "org/name ../shared/x ./a/b re:.*\\.mlp\\.down 3/4": (
            "org/name ../shared/x ./a/b re:.*\\.mlp\\.down 3/4"
        ),
    }
    assert {text: redact(text) for text in cases} == cases
