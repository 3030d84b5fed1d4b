"""Objects in a bucket of anything that speaks S3, through the minio client."""

from __future__ import annotations

import builtins
import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import certifi
import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error
from urllib3.exceptions import HTTPError

from sailyard.artifacts.objects import (
    CHUNK_BYTES,
    ObjectNotFound,
    ObjectStore,
    StoreError,
    StoreFull,
    StoreUnavailable,
    check_key,
    object_size,
    open_checked,
    space_errors,
)
from sailyard.settings import Settings

PART_BYTES = 16 << 20
"""Size of one part of a multipart upload; smaller objects go up in one request."""

RETRIES = 6
"""Tries after the first: waits of 0, 0.5, 1, 2, 4 and 8 seconds ride over a short restart."""

_BACKOFF_SECONDS = 0.25
_KEY_CODES = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_FULL_CODES = ("XMinioStorageFull", "XMinioStorageQuotaExceeded", "InsufficientStorage")
_TAKEN_CODES = ("PreconditionFailed", "ConditionalRequestConflict")


class ConditionalMinio(Minio):
    """The minio client with the one call it lacks: a put that refuses to overwrite."""

    def put_if_absent(self, bucket: str, key: str, data: bytes) -> bool:
        """PUT with ``If-None-Match: *``; False if the object was there already.

        The client's public put_object takes no condition, and metadata would be renamed to
        ``x-amz-meta-*``, so this uses the private call beneath it; a test pins its behaviour.
        """
        headers = cast(Any, {"Content-Type": "application/octet-stream", "If-None-Match": "*"})
        try:
            self._put_object(bucket, key, data, headers)
        except S3Error as error:
            if error.code not in _TAKEN_CODES:
                raise
            # A first try may have been written and its answer lost: then what lies there is ours.
            return _was_retried(error) and self._read(bucket, key) == data
        return True

    def _read(self, bucket: str, key: str) -> bytes:
        response = self.get_object(bucket, key)
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()


class S3Store(ObjectStore):
    """An object store in an S3 bucket.

    Requests are repeated with growing pauses when the connection is lost or the server is
    overloaded; a download goes on where it broke off. When the retries are used up
    StoreUnavailable says so.

    Args:
        settings: Where the bucket is (``store`` is ``s3://bucket/prefix``) and the keys to it.
        retries: Tries after the first.
    """

    def __init__(self, settings: Settings, retries: int = RETRIES) -> None:
        bucket, _, prefix = settings.store.removeprefix("s3://").partition("/")
        if not settings.store.startswith("s3://") or not bucket:
            raise StoreError(f"{settings.store!r} is not a bucket; write s3://bucket/prefix")
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.endpoint, self.retries = settings.s3_endpoint, retries
        self.client = ConditionalMinio(
            settings.s3_endpoint,
            access_key=settings.s3_access_key or None,
            secret_key=settings.s3_secret_key.get_secret_value() or None,
            secure=settings.s3_secure,
            region=settings.s3_region,
            http_client=_http_client(retries),
        )

    def create_bucket(self) -> bool:
        """Create the bucket if it is missing; return whether it was."""
        with self._errors("creating", ""):
            if self.client.bucket_exists(self.bucket):
                return False
            self.client.make_bucket(self.bucket)
            return True

    def put(
        self, key: str, data: bytes | Path, if_absent: bool = False, sha256: str | None = None
    ) -> bool:
        """See ObjectStore.put; with if_absent at most PART_BYTES.

        Larger conditional writes would need a condition on the last step of a multipart upload,
        which not every server honours.
        """
        size = object_size(data)
        if if_absent and size > PART_BYTES:
            raise StoreError(
                f"{key}: a conditional write takes at most {PART_BYTES} bytes, got {size}"
            )
        with self._errors("writing", key), open_checked(data, sha256, key) as source:
            if if_absent:
                return self.client.put_if_absent(self.bucket, self._full(key), source.read())
            # The client sends parts as it reads them and gives the upload up when reading fails,
            # so the object appears whole or not at all.
            self.client.put_object(
                self.bucket,
                self._full(key),
                cast(BinaryIO, source),
                size,
                part_size=PART_BYTES,
                num_parallel_uploads=2,
            )
        return True

    def get(self, key: str) -> bytes:
        """See ObjectStore.get."""
        pieces: builtins.list[bytes] = []
        with self._errors("reading", key):
            self._stream(key, pieces.append)
        return b"".join(pieces)

    def download(self, key: str, path: Path) -> str:
        """See ObjectStore.download."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        digest = hashlib.sha256()
        try:
            with (
                self._errors("reading", key),
                space_errors(path.parent, f"reading {key}"),
                partial.open("wb") as sink,
            ):

                def take(chunk: bytes) -> None:
                    digest.update(chunk)
                    sink.write(chunk)

                self._stream(key, take)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return digest.hexdigest()

    def size(self, key: str) -> int | None:
        """See ObjectStore.size."""
        try:
            with self._errors("looking for", key):
                return self.client.stat_object(self.bucket, self._full(key)).size
        except ObjectNotFound:
            return None

    def list(self, prefix: str = "") -> builtins.list[str]:
        """See ObjectStore.list."""
        with self._errors("listing", prefix):
            found = self.client.list_objects(
                self.bucket, prefix=self.prefix + prefix, recursive=True
            )
            names = [item.object_name or "" for item in found]
        return sorted(name.removeprefix(self.prefix) for name in names)

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        with self._errors("deleting", key):
            self.client.remove_object(self.bucket, self._full(key))

    def _full(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _stream(self, key: str, take: Callable[[bytes], object]) -> None:
        """Hand the object over in chunks; a lost connection resumes at the byte it reached."""
        received, etag, failures = 0, "", 0
        while True:
            # If-Match: a resumed read must not join two versions of the object.
            headers = cast(Any, {"If-Match": etag} if etag else None)
            response = self.client.get_object(
                self.bucket, self._full(key), offset=received, request_headers=headers
            )
            etag = response.headers.get("etag", "")
            try:
                for chunk in response.stream(CHUNK_BYTES):
                    take(chunk)
                    received += len(chunk)
                return
            except HTTPError:
                failures += 1
                if failures > self.retries:
                    raise
                time.sleep(_BACKOFF_SECONDS * 2**failures * random.uniform(0.5, 1.0))
            finally:
                response.close()
                response.release_conn()

    @contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        what = f"{doing} {key}".strip()
        where = f"bucket {self.bucket} at {self.endpoint}"
        try:
            yield
        except S3Error as error:
            raise _explain(error, what, where) from error
        except (HTTPError, MinioException) as error:
            if isinstance(error, InvalidResponseError) and "507" in str(error):
                raise StoreFull(f"{where} has no space left while {what}") from error
            raise StoreUnavailable(
                f"no answer from {where} while {what}, after {self.retries + 1} tries: {error}; "
                "nothing half written became visible: run again when the server is back"
            ) from error


def _explain(error: S3Error, what: str, where: str) -> StoreError:
    if error.code in ("NoSuchKey", "NoSuchObject"):
        return ObjectNotFound(f"no such object in {where} while {what}")
    if error.code == "NoSuchBucket":
        return StoreError(f"{where} does not exist: create it, or correct SAILYARD_STORE")
    if error.code in _KEY_CODES:
        return StoreError(
            f"{where} refused the keys while {what} ({error.code}): check "
            "SAILYARD_S3_ACCESS_KEY and SAILYARD_S3_SECRET_KEY"
        )
    if error.code in _FULL_CODES:
        return StoreFull(f"{where} has no space left while {what} ({error.code})")
    if error.code == "PreconditionFailed":
        return StoreUnavailable(f"an object of {where} was replaced while {what}; run again")
    return StoreUnavailable(f"{where} failed while {what}: {error.code}: {error.message}")


def _http_client(retries: int) -> urllib3.PoolManager:
    return urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=5, read=30),
        maxsize=10,
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
        retries=urllib3.Retry(
            total=retries,
            backoff_factor=_BACKOFF_SECONDS,
            backoff_jitter=_BACKOFF_SECONDS,
            status_forcelist=[429, 500, 502, 503, 504],
            # Every request of this client may be repeated: puts replace whole objects, and a
            # multipart upload that is completed twice says so without harm.
            allowed_methods=None,
        ),
    )


def _was_retried(error: S3Error) -> bool:
    retries = getattr(error.response, "retries", None)
    return bool(retries is not None and retries.history)
