"""Token streams for calibration, distillation and evaluation: the same text gives the same rows.

    source -> rows -> documents -> tokens -> [num_samples, seq_len]

Sources are files (.txt, .jsonl, .json, .parquet), names for `datasets`, or the text that comes
with the embedded reference model.
"""

from compressor.data.rows import TokenRows, overlap, token_rows
from compressor.data.sources import Document, Tally, load_documents, load_texts

__all__ = [
    "Document",
    "Tally",
    "TokenRows",
    "load_documents",
    "load_texts",
    "overlap",
    "token_rows",
]
