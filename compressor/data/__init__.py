"""Token streams for calibration, distillation and evaluation: the same text gives the same rows.

    source -> rows -> documents -> tokens -> [num_samples, seq_len]

Sources are files (.txt, .jsonl, .json, .parquet), names for `datasets`, the text that comes with
the embedded reference model, text the model wrote itself, or a mixture of these in exact shares.
"""

from compressor.data.contamination import Contamination, contamination
from compressor.data.rows import SourceFacts, TokenRows, one_document_a_row, token_rows
from compressor.data.sources import Document, Tally, load_documents, load_texts

__all__ = [
    "Contamination",
    "Document",
    "SourceFacts",
    "Tally",
    "TokenRows",
    "contamination",
    "load_documents",
    "load_texts",
    "one_document_a_row",
    "token_rows",
]
