"""Run folders: lock, journal of finished units, resume, polite stops and publishing."""

from compressor.run_dir.files import (
    mount_of,
    resource_error,
    sha256_file,
    sync_folder,
    sync_tree,
    write_atomic,
)
from compressor.run_dir.journal import Journal, Record
from compressor.run_dir.lock import FolderLock
from compressor.run_dir.publish import check_output, publish, recover_output
from compressor.run_dir.run import RunDir, StageRun
from compressor.run_dir.signals import StopSignals

__all__ = [
    "FolderLock",
    "Journal",
    "Record",
    "RunDir",
    "StageRun",
    "StopSignals",
    "check_output",
    "mount_of",
    "publish",
    "recover_output",
    "resource_error",
    "sha256_file",
    "sync_folder",
    "sync_tree",
    "write_atomic",
]
