"""What every test shares: one thread, no network, tiny models built once per session."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COMPRESSOR_CACHE"] = tempfile.mkdtemp(prefix="compressor-test-cache-")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.fixtures_models import build

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_models("llama")` is a checkpoint folder, built at the first call: read-only."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else build(name, path)

    return get


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """transformers without progress bars and warnings."""
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)
