"""Recorded soft targets: one immutable file for each view of a block, under each labelling.

STORE/FINGERPRINT/labelling.json tells how a corpus is labelled; files of soft targets lie below it.
Labels are pure functions: whoever records a block records the same, so no lock is needed.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from engine.config import UserError
from engine.data.order import Blocks
from engine.data.sample_list import SampleList
from engine.labels.labelling import Labelling
from engine.labels.target_files import Damaged, Name, decode, encode, folder_of
from engine.labels.targets import BlockView, Form, SoftTargets, finite
from engine.progress import say
from engine.storage.folder import Folder, open_folder

__all__ = ["LABELLING", "Recorded", "Store"]

LABELLING = "labelling.json"


class Store:
    """A folder, or an s3 or gs URL, that holds labellings. Raises UserError, naming `field`, for
    any other place, and where it cannot be listed or read."""

    def __init__(self, where: str, field: str = "targets.store") -> None:
        self.where, self._field = where, field
        self.folder: Folder = open_folder(where, field)

    def labellings(self) -> dict[str, Labelling]:
        """By fingerprint. Raises UserError for a description that is damaged."""
        found = {}
        try:
            for fingerprint in self.folder.entries(""):
                try:
                    text = self.folder.read(f"{fingerprint}/{LABELLING}")
                except (FileNotFoundError, NotADirectoryError):
                    continue  # not ours
                found[fingerprint] = self._parsed(fingerprint, text)
        except OSError as error:
            raise UserError(f"{self._field}: {self.where} cannot be read: {error}") from None
        return found

    def open(self, labelling: Labelling, *, add: bool) -> "Recorded":
        """The files of a labelling, which may be new.

        Raises UserError where the corpus has been labelled otherwise alone, unless to `add`.
        """
        known = self.labellings()
        rivals = {f: one for f, one in known.items() if one.corpus == labelling.corpus}
        if labelling.fingerprint not in known:
            if rivals and not add:
                raise UserError(
                    f"{self._field}: {self.where} holds labels of this corpus by another labelling:"
                    f"{_nearest(labelling, rivals)}\nName another folder, or record beside it by "
                    f"--targets.add_labelling{_hint(labelling, rivals)}"
                )
            if known:
                say(f"{self.where}: labelling {labelling.fingerprint} is new there, and is added")
        return self.recorded(labelling)

    def require(self, labelling: Labelling, corpus: str) -> "Recorded":
        """The files of a labelling that is there. Raises UserError where it is not, naming the
        corpus by its field."""
        known = self.labellings()
        if not known:
            raise UserError(f"{self._field}: {self.where} holds no labels")
        if labelling.fingerprint not in known:
            rivals = any(one.corpus == labelling.corpus for one in known.values())
            beside = " --targets.add_labelling" if rivals else ""
            raise UserError(
                f"{self._field}: {self.where} holds no labels of corpus.{corpus} by this labelling:"
                f"{_nearest(labelling, known)}\nWhat is not there is labelled, and recorded, by "
                f"--targets.source auto{beside}{_hint(labelling, known)}"
            )
        return self.recorded(labelling)

    def recorded(self, labelling: Labelling) -> "Recorded":
        """The files of a labelling, without a look at what else is there: for the workers of a run
        whose driver has looked."""
        return Recorded(self.folder, self.where, labelling)

    def _parsed(self, fingerprint: str, text: bytes) -> Labelling:
        path = f"{self.where.rstrip('/')}/{fingerprint}/{LABELLING}"
        try:
            labelling = Labelling.from_json(text.decode())
        except ValueError as error:
            raise UserError(
                f"{self._field}: {path} is damaged: {error}; remove its folder"
            ) from None
        if labelling.fingerprint != fingerprint:
            raise UserError(f"{self._field}: {path} describes another labelling; remove its folder")
        return labelling


def _by_differences(ours: Labelling, known: Mapping[str, Labelling]) -> tuple[str, list[str]]:
    told = ((fingerprint, ours.differences(other)) for fingerprint, other in known.items())
    return min(told, key=lambda pair: (len(pair[1]), pair[0]))


def _nearest(ours: Labelling, known: Mapping[str, Labelling]) -> str:
    fingerprint, lines = _by_differences(ours, known)
    others = f" ({len(known) - 1} more differ too)" if len(known) > 1 else ""
    listed = "".join(f"\n  {line}" for line in lines)
    return f"\nnearest is {fingerprint}{others}, where 'here' is this run{listed}"


def _hint(ours: Labelling, known: Mapping[str, Labelling]) -> str:
    fingerprint, lines = _by_differences(ours, known)
    alone = len(lines) == 1 and known[fingerprint].seed != ours.seed
    if alone:
        return f", or take its views by --corpus.view_seed {known[fingerprint].seed}"
    if len(lines) == 1 and known[fingerprint].class_vectors != ours.class_vectors:
        return ", or take the class vectors of the run that recorded, by --classes.vectors"
    return ""


class Recorded:
    """The files of one labelling. Safe for threads; other processes may record meanwhile.

    A damaged file counts as one that is not there, and is replaced when its block is put again.
    After a write that failed `recording` is False, and nothing is written any more.
    """

    def __init__(self, folder: Folder, where: str, labelling: Labelling) -> None:
        self.where, self.labelling, self.fingerprint = where, labelling, labelling.fingerprint
        self.form: Form = "logits" if labelling.form == "logits" else "features"
        self.recording = True
        self.read = self.written = self.damaged = 0  # blocks, blocks or parts of them, files
        self.unrecorded = 0  # blocks or parts of them, since a write failed
        self.read_bytes = self.written_bytes = 0
        self._folder = folder
        self._described = False
        self._bad: set[Name] = set()
        self._told: set[str] = set()  # what was said once
        self._lock = threading.Lock()

    def missing(self, view: int, blocks: Blocks, listed: SampleList | None = None) -> int:
        """Blocks of the corpus whose view is not there as a whole; or, of those that hold listed
        samples, not for all of these. Lists all names, and reads parts of blocks alone. Raises
        UserError where the store cannot be listed."""
        whole = np.zeros(len(blocks), bool)
        parts: dict[int, list[Name]] = defaultdict(list)
        try:
            for file, size in self._folder.files(f"{self.fingerprint}/{folder_of(view)}"):
                name = Name.parse(file)
                if name and size and name.block < len(whole) and name not in self._bad:
                    if name.samples is None:
                        whole[name.block] = True
                    else:
                        parts[name.block].append(name)
        except OSError as error:
            raise UserError(f"targets.store: {self.where} cannot be listed: {error}") from None
        for block, names in parts.items():
            if not whole[block] and (listed is None or listed.counts[block]):
                needed = listed.offsets(block) if listed else None
                whole[block] = self._merged(names, blocks.at(block).length, needed) is not None
        return int((~whole if listed is None else ~whole[listed.used]).sum())

    def get(
        self, wanted: BlockView, length: int, needed: np.ndarray | None = None
    ) -> SoftTargets | None:
        """The labels of a block of `length` samples; None where not all are there, or not all at
        the offsets `needed`: others then may be zeros, and not valid."""
        name = Name.of(wanted.view, wanted.block)
        found = self._load(name, length)
        targets = found[0] if found else self._merged(self._parts(name), length, needed)
        if targets:
            with self._lock:
                self.read += 1
        return targets

    def put(
        self,
        wanted: BlockView,
        targets: SoftTargets,
        offsets: np.ndarray | None = None,
        length: int | None = None,
    ) -> None:
        """Records a block, or its samples at `offsets`, ascending. A part that has all `length`
        samples is a whole block."""
        assert targets.fingerprint == self.fingerprint and targets.form == self.form
        if not self.recording:
            with self._lock:
                self.unrecorded += 1
            return
        if not finite(targets):
            self._say_once("finite", f"label of {wanted} is not finite: such are not recorded")
            return
        if offsets is not None and len(offsets) == length:
            offsets = None
        name = Name.of(wanted.view, wanted.block, offsets)
        data = encode(wanted, targets, offsets)
        try:
            self._describe()
            fresh = self._folder.write(self._path(name), data, replace=name in self._bad)
        except OSError as error:
            self.recording, self.unrecorded = False, 1
            self._say_once("write", f"{self.where}: no more labels are recorded: {error}")
            return
        with self._lock:
            self._bad.discard(name)
            self.written += fresh
            self.written_bytes += fresh * len(data)

    def _load(
        self, name: Name, length: int | None = None
    ) -> tuple[SoftTargets, np.ndarray | None] | None:
        """What a file holds; None where it is not there, or is damaged."""
        try:
            data = self._folder.read(self._path(name))
            targets, offsets = decode(data, name, self.fingerprint)
            if offsets is None and length is not None and len(targets.valid) != length:
                raise Damaged(f"holds {len(targets.valid)} samples of {length}")
        except FileNotFoundError:
            return None
        except (OSError, Damaged) as error:
            with self._lock:
                self.damaged += name not in self._bad  # which may be read several times
                self._bad.add(name)
            self._say_once(
                "damaged",
                f"{self.where}: {self._path(name)}: {error}; taken as not there, as are all such "
                "files from now on",
            )
            return None
        with self._lock:
            self.read_bytes += len(data)
        return targets, offsets

    def _parts(self, whole: Name) -> list[Name]:
        """Those of one block that there are now."""
        folder = folder_of(whole.view, whole.block)
        try:
            files = self._folder.entries(f"{self.fingerprint}/{folder}")
        except OSError as error:
            self._say_once("list", f"{self.where}: {folder}: {error}; taken as not there")
            return []
        start = f"{whole.block:09d}."
        names = (Name.parse(f"{folder}/{file}") for file in files if file.startswith(start))
        return [name for name in names if name and name.samples is not None]

    def _merged(
        self, names: list[Name], length: int, needed: np.ndarray | None = None
    ) -> SoftTargets | None:
        """The block that parts make up; None where some of it, or of what is needed of it, is in
        none."""
        needed = np.arange(length) if needed is None else needed
        if sum(name.samples or 0 for name in names) < len(needed):
            return None
        parts = [found for name in names if (found := self._load(name))]
        missing = np.ones(length, bool)
        places: list[np.ndarray] = []  # of each part
        for _, offsets in parts:
            assert offsets is not None
            if len(offsets) and offsets[-1] >= length:
                return None
            missing[offsets] = False
            places.append(offsets)
        if missing[needed].any() or not parts:
            return None
        return _joined([targets for targets, _ in parts], places, length)

    def _describe(self) -> None:
        """Writes the description of the labelling, at the first put."""
        if not self._described:
            text = self.labelling.to_json().encode()
            self._folder.write(f"{self.fingerprint}/{LABELLING}", text, replace=False)
            self._described = True

    def _path(self, name: Name) -> str:
        return f"{self.fingerprint}/{name}"

    def _say_once(self, what: str, message: str) -> None:
        with self._lock:
            first = what not in self._told
            self._told.add(what)
        if first:
            say(message)


def _joined(parts: list[SoftTargets], places: list[np.ndarray], length: int) -> SoftTargets:
    """Where parts overlap, they are equal."""
    first = parts[0]
    values = np.zeros((length, first.values.shape[1]), first.values.dtype)
    steps = None if first.steps is None else np.zeros(length, np.float32)
    valid = np.zeros(length, bool)
    for part, offsets in zip(parts, places, strict=True):
        values[offsets], valid[offsets] = part.values, part.valid
        if steps is not None:
            steps[offsets] = part.steps
    weights = [int(part.valid.sum()) for part in parts]
    lost = sum(w * part.lost_kl for w, part in zip(weights, parts, strict=True))
    return first._replace(
        values=values, steps=steps, valid=valid, lost_kl=lost / max(sum(weights), 1)
    )
