"""Replies that a run keeps (`engine.keep_replies`), from which its merges can be done again without one client.

Below `replies/` of the run folder lie `open.safetensors`, the state before the first round, and for each round a folder with one for every
question that was put in it: `round-00003/0-train/<client>.safetensors`, the reply as it was merged, beside the digest of the state that
came of them. All is written before the commit of its round; a resume drops what belongs to none.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedgraft import files, words
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle

FOLDER, OPEN, MERGED = "replies", "open", "merged.txt"
ROUND = re.compile(r"round-(\d{5,})")
HEADER = 16_384  # bytes of names and figures beside the leaves of a reply, generously


@dataclass
class Kept:
    """The kept replies of a run folder."""

    run: Path
    wanted: bool = True
    """Off: nothing is written."""
    most: int = 0
    """Bytes that all replies of the run will take at most."""
    _place: Path | None = None
    """Where the replies of the round in hand go."""
    _asks: int = 0

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.run / FOLDER

    def plan(self, reply: int, clients: int, rounds: int) -> list[tuple[str, str]]:
        """What will be kept, as a line for the first screen.

        Args:
            reply: bytes of leaves in one reply.
            clients: that are asked in a round, of which each may reply.
            rounds: of the run.

        Raises:
            ValueError: the disk has not so much room.
        """
        if not self.wanted:
            return []
        self.most = rounds * clients * (reply + HEADER)
        _room(self.run, self.most)
        return [("keeps", f"the replies of {rounds} rounds, at most {words.size(self.most)} in {FOLDER}/")]

    def opening(self) -> None:
        """What comes now is asked before the first round; whatever lies there is of a run that did not come so far."""
        if self.wanted:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._place, self._asks = self.folder / OPEN, 0

    def opened(self, state: Bundle) -> None:
        """Keep the state before the first round."""
        if self.wanted:
            state.save(self._state)
        self._place = None

    def round(self, number: int) -> None:
        """What comes now belongs to this round."""
        if self.wanted:
            self._place, self._asks = self._round(number), 0

    def merged(self, state: Bundle) -> None:
        """Note the state that the round's replies were merged to; what comes now is not kept."""
        if self._place is not None:
            files.write_text(self._place / MERGED, state.digest() + "\n")
        self._place = None

    def keeping(self, question: str, replies: Iterator[Reply]) -> Iterator[Reply]:
        """The replies to one question, each written before it is merged."""
        place = None if self._place is None else self._place / f"{self._asks}-{question}"
        self._asks += 1
        for reply in replies:
            if place is not None:
                reply.bundle.save(place / f"{reply.client}.safetensors")
            yield reply

    def drop_from(self, rounds: int) -> None:
        """Drop what belongs to rounds that are not finished."""
        for path in self.folder.glob("round-*"):
            if (found := ROUND.fullmatch(path.name)) and int(found[1]) >= rounds:
                shutil.rmtree(path)

    def state(self) -> Bundle:
        """The state before the first round.

        Raises:
            ValueError: it was not kept.
        """
        if not self._state.is_file():
            raise ValueError(f"{self._state}: missing; restore it from a copy")
        return Bundle.load(self._state)

    def refuse_other(self, number: int, state: Bundle) -> None:
        """Let only the state pass that the replies of a round were merged to.

        Raises:
            ValueError: another one.
        """
        path = self._round(number) / MERGED
        if not path.is_file() or files.read_text(path).strip() != state.digest():
            raise ValueError(
                f"{self.folder}: these replies do not lead to the state of the run after round {number + 1}, so some are missing or "
                "changed; restore them from a copy"
            )

    def asks(self, number: int) -> dict[int, dict[str, Path]]:
        """Of one round: number of the question in it -> client -> file of its reply; a question without replies is absent."""
        found = {}
        for place in sorted(self._round(number).glob("*-*")):
            found[int(place.name.partition("-")[0])] = {
                path.name.removesuffix(".safetensors"): path for path in sorted(place.glob("*.safetensors"))
            }
        return found

    def of(self, client: str) -> list[Path]:
        """All files of one client."""
        return sorted(path for path in self.folder.glob("*/*/*.safetensors") if path.name == f"{client}.safetensors")

    @property
    def _state(self) -> Path:
        return self.folder / f"{OPEN}.safetensors"

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:05d}"


def _room(run: Path, most: int) -> None:
    """Let only a run pass whose replies, of which some may be there, have room on the disk.

    Raises:
        ValueError: they don't.
    """
    there = next(part for part in (run.absolute(), *run.absolute().parents) if part.exists())
    needed = most - sum(path.stat().st_size for path in (run / FOLDER).rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"engine.keep_replies: the replies of all rounds take up to {words.size(needed)}, and {words.size(free)} are free at {there}; "
            "free some, set another --out, or set it to false"
        )
