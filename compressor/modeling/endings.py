"""Which tokens end a text: for whoever lets a model write."""

from __future__ import annotations

from typing import Any


def end_of_text_ids(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """Ids that end a text: the generation config's, else the model's, else the tokenizer's."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
