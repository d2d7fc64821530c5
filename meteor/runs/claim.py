"""Ownership of a folder by the newest start of the command that writes it, so that two starts never mix their results.

Every start takes the next number in ``attempts/`` by a conditional put. A start whose number is no longer the newest stops
before its next write. It may be a second terminal, a job that was submitted twice, or a process on a machine that was cut off.
"""

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from meteor import storage
from meteor.checksums import checked_json_bytes, read_checked_json
from meteor.errors import AlreadyExistsError, SupersededError


@dataclass(frozen=True)
class Claim:
    """Claim of one start on a folder; make it by `take`.

    Attributes:
        uri: URI of the claimed folder.
        number: number of the claim, from 0; a newer claim has a larger number.
        owner: random name of the start, shared by the claims of its workers.
        about: content of the claim's file: process, machine and time, for messages.
        is_exact: whether newer claims of the same start end this claim too.
    """

    uri: str
    number: int
    owner: str
    about: Mapping[str, Any] = field(compare=False)
    is_exact: bool = False

    @classmethod
    def take(cls, folder_uri: str, **about: Any) -> "Claim":
        """Claim a folder; claims of earlier starts end.

        Args:
            folder_uri: folder to claim.
            **about: JSON values for messages, beside machine, process and time.
        """
        return _create(folder_uri, uuid.uuid4().hex, about, is_exact=False)

    def for_workers(self) -> "Claim":
        """Claim the folder for a new group of workers of this start; claims of its earlier groups end.

        Raises:
            SupersededError: another start has claimed the folder.
        """
        return _create(self.uri, self.owner, self.about, is_exact=True)

    def check(self) -> None:
        """Raise SupersededError if a newer claim has ended this one."""
        newest = max(_numbers(self.uri), default=self.number)
        if newest <= self.number:
            return
        content = read_checked_json(_file(self.uri, newest))
        if self.is_exact or content["owner"] != self.owner:
            raise _superseded(self.uri, content)

    def is_current(self) -> bool:
        """Return whether no newer claim has ended this one."""
        try:
            self.check()
        except SupersededError:
            return False
        return True


def _create(uri: str, owner: str, about: Mapping[str, Any], *, is_exact: bool) -> Claim:
    about = {
        **about,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    while True:
        newest = max(_numbers(uri), default=-1)
        if is_exact and (content := read_checked_json(_file(uri, newest)))["owner"] != owner:
            raise _superseded(uri, content)
        number, content = newest + 1, {**about, "owner": owner, "id": uuid.uuid4().hex}
        try:
            storage.create_bytes(_file(uri, number), checked_json_bytes(content))
        except AlreadyExistsError:
            # On S3 the file may be this one, from a put whose answer was lost.
            if read_checked_json(_file(uri, number)) != content:
                continue
        return Claim(uri, number, owner, about, is_exact)


def _numbers(uri: str) -> list[int]:
    names = [info.uri.rpartition("/")[2].removesuffix(".json") for info in storage.list_objects(_folder(uri))]
    return [int(name) for name in names if name.isdecimal()]


def _folder(uri: str) -> str:
    return storage.join(uri, "attempts")


def _file(uri: str, number: int) -> str:
    return storage.join(_folder(uri), f"{number:04d}.json")


def _superseded(uri: str, content: Mapping[str, Any]) -> SupersededError:
    job = f", job {content['job']}" if content.get("job") else ""
    return SupersededError(
        f"{uri} was taken over by a newer start (process {content['pid']} on {content['host']}{job}, {content['started']}), so "
        "this one has stopped. Nothing is lost: the newer start goes on from what is stored"
    )
