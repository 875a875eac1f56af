"""The shapes of what OpenAI's files, batches and stored responses answer: types only, and how rows become them."""

from __future__ import annotations

import json
from typing import Any, Literal

from msgspec import Struct

from headrace.gateway.state.batches import Batch
from headrace.gateway.state.files import File


class FileShown(Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[FileShown]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Struct):
    id: str
    object: str
    deleted: bool = True


class LineError(Struct):
    code: str
    message: str
    param: str | None
    line: int | None


class LineErrors(Struct):
    data: list[LineError]
    object: Literal["list"] = "list"


class Counts(Struct):
    total: int
    completed: int
    failed: int


Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]


class BatchShown(Struct, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: LineErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None


class BatchList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[BatchShown]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ItemList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def file_shown(file: File) -> FileShown:
    return FileShown(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_s,
        expires_at=file.expires_s,
        filename=file.filename,
        purpose=file.purpose,
    )


def batch_shown(batch: Batch, counts: tuple[int, int]) -> BatchShown:
    found = json.loads(batch.errors or "{}").get("data")
    return BatchShown(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=LineErrors([LineError(**error) for error in found]) if found else None,
        input_file_id=batch.input_file_id,
        status=batch.status,  # type: ignore[arg-type]
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_s,
        in_progress_at=batch.in_progress_s,
        expires_at=batch.expires_s,
        finalizing_at=batch.finalizing_s,
        completed_at=batch.completed_s,
        failed_at=batch.failed_s,
        expired_at=batch.expired_s,
        cancelling_at=batch.cancelling_s,
        cancelled_at=batch.cancelled_s,
        request_counts=Counts(batch.total, *counts),
        metadata=json.loads(batch.metadata) if batch.metadata else None,
    )
