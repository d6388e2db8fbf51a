"""Which tokens are sample number N: a pure function of the recipe's seed and N, so any rank can ask for any sample."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trireme_api.mixture import MixtureSpec
from trireme_api.recipe import DataSource, Recipe

from trireme_trainer.data.composition import compose
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.order import Interleaving, derive, permute, shuffled
from trireme_trainer.data.remote import local_copy
from trireme_trainer.data.shards import Corpus, Documents
from trireme_trainer.data.tokenizer import SpecialTokens, special_tokens
from trireme_trainer.storage import StorageError

_DOCUMENTS, _BLOCKS = 1, 2
_EPOCHS_KEPT = 2
"""The prefetch thread and the training thread may stand on either side of an epoch's end."""


@dataclass(frozen=True)
class _Epoch:
    order: NDArray[np.uint32]
    """[documents]: document numbers in this epoch's order."""
    ends: NDArray[np.int64]
    """[documents]: position after each of them in the epoch's stream."""


def _cut(documents: Documents, epoch: _Epoch, begin: int, size: int) -> NDArray[np.int64]:
    """Tokens [size] of an epoch's stream from position `begin`."""
    block = np.empty(size, dtype=np.int64)
    place = int(np.searchsorted(epoch.ends, begin, side="right"))
    filled = 0
    while filled < size:
        document = int(epoch.order[place])
        length = int(documents.lengths[document])
        skip = begin + filled - (int(epoch.ends[place]) - length)
        take = min(length - skip, size - filled)
        block[filled : filled + take] = documents.read(document, skip, skip + take)
        filled += take
        place += 1
    documents.check_range(block)
    return block


class PackedSource:
    """One source's training blocks, packed as OPT was (2205.01068 §2.3): documents in an order drawn per (seed, epoch,
    source), one stream, cut in blocks of sequence_length + 1, the remainder of the epoch dropped, attention not
    stopped at document ends. The blocks of an epoch are then drawn in an order of their own, which does for the whole
    epoch what the reference's shuffle buffer does for a window.
    """

    def __init__(self, documents: Documents, sequence_length: int, key: int) -> None:
        self._documents = documents
        self._block = sequence_length + 1
        self._key = key
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lock = threading.Lock()
        self.blocks_per_epoch = documents.tokens // self._block
        if self.blocks_per_epoch == 0:
            raise DataError(
                f"{documents.where}: {documents.tokens} tokens are less than one block of {self._block} "
                f"(data.sequenceLength + 1); give more text or a shorter data.sequenceLength"
            )

    def block(self, number: int) -> NDArray[np.int64]:
        """Tokens [sequence_length + 1] of block `number`, counted over all epochs. O(log documents)."""
        epoch, place = divmod(number, self.blocks_per_epoch)
        place = permute(place, self.blocks_per_epoch, derive(self._key, _BLOCKS, epoch))
        return _cut(self._documents, self._epoch(epoch), place * self._block, self._block)

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            found = self._epochs.get(number)
            if found is None:
                order = shuffled(len(self._documents), derive(self._key, _DOCUMENTS, number))
                found = _Epoch(order, np.cumsum(self._documents.lengths[order]))
                self._epochs[number] = found
                while len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            else:
                self._epochs.move_to_end(number)
            return found


class Mixture:
    """All sources of a recipe as one endless sequence of blocks, interleaved in proportion to their weights, or as
    `spec` says.

    Each source runs through epochs of its own. After any number of samples, each source has given its share to less
    than one block (shares as written, or to 1/65536 where the weights have no short common measure).
    Raises DataError for a source that is missing, damaged, too small, or made with another tokenizer than the first.
    """

    def __init__(
        self, sources: Sequence[DataSource], sequence_length: int, seed: int, verify: bool = False,
        spec: MixtureSpec | None = None,
    ) -> None:  # fmt: skip
        if not sources:
            raise DataError("data.sources: give at least one source")
        self.sequence_length = sequence_length
        self.seed = seed
        self.sources = list(sources)
        self._corpora = [_open(source, i, verify) for i, source in enumerate(self.sources)]
        first = self._corpora[0].manifest
        self.parts = compose(self.sources, [corpus.manifest for corpus in self._corpora], spec)
        self.vocabulary_size = first.vocabulary
        self.tokenizer: str | None = first.tokenizer.sha256
        self.end_of_document = first.tokenizer.end_of_document
        self._packed = [
            PackedSource(corpus.train, sequence_length, derive(seed, i)) for i, corpus in enumerate(self._corpora)
        ]
        self._mixed_by = "data.sources[{}].weight" if spec is None else "data.mixture: the weight of data.sources[{}]"
        self._interleaving = Interleaving([part.weight for part in self.parts])

    @classmethod
    def from_recipe(cls, recipe: Recipe, verify: bool = False) -> Mixture:
        return cls(recipe.data.sources, recipe.data.sequence_length, recipe.seed, verify, recipe.data.mixture)

    def sample(self, global_index: int) -> NDArray[np.int64]:
        """Tokens [sequence_length + 1] of sample `global_index` ≥ 0. Raises DataError for a damaged shard."""
        source, number = self._interleaving.locate(global_index)
        return self._packed[source].block(number)

    def locate(self, global_index: int) -> tuple[int, int, int]:
        """(source, epoch of that source, number of the block in its epoch) of a sample."""
        source, number = self._interleaving.locate(global_index)
        return (source, *divmod(number, self._packed[source].blocks_per_epoch))

    def special_tokens(self) -> SpecialTokens:
        """Of the tokenizer that all sources have. Raises DataError where it has no mask token."""
        where = f"data.sources[0].path: {self.sources[0].path}"
        return special_tokens(self._corpora[0].tokenizer(), where, self.end_of_document)

    @property
    def directories(self) -> list[str]:
        """By source: where its files are on this machine."""
        return [corpus.directory for corpus in self._corpora]

    @property
    def blocks_per_epoch(self) -> list[int]:
        """By source."""
        return [packed.blocks_per_epoch for packed in self._packed]

    def told(self, blocks: int) -> list[dict[str, Any]]:
        """By source: language, share of the blocks, and epochs that a run of so many blocks sees."""
        return [part.told(size, blocks) for part, size in zip(self.parts, self.blocks_per_epoch, strict=True)]

    @property
    def unigram_entropy(self) -> list[float]:
        """By source, nats per token."""
        return [corpus.manifest.unigram_entropy for corpus in self._corpora]

    def valid_blocks(self, source: int = 0) -> HeldOut:
        """The held-out blocks of one source, in the order of the corpus."""
        return HeldOut(self._corpora[source].valid, self.sequence_length)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the order and content of samples; plain JSON, to be kept with a checkpoint."""
        return {
            "seed": self.seed,
            "sequenceLength": self.sequence_length,
            "sources": [
                {"path": part.path, "weight": part.weight, "fingerprint": corpus.fingerprint}
                for part, corpus in zip(self.parts, self._corpora, strict=True)
            ],
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of `identity` without the paths: data may be moved, not changed."""
        content = self.identity
        for source in content["sources"]:
            del source["path"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def changes_since(self, saved: dict[str, Any]) -> list[str]:
        """How this mixture differs from an `identity` kept earlier, one line each; empty when samples are the same."""
        now, found = self.identity, []
        for name in ("seed", "sequenceLength"):
            if saved.get(name) != now[name]:
                found.append(f"{name} was {saved.get(name)}, is {now[name]}")
        before = saved.get("sources", [])
        if len(before) != len(now["sources"]):
            found.append(f"data.sources: were {len(before)}, are {len(now['sources'])}")
            return found
        for i, (old, new) in enumerate(zip(before, now["sources"], strict=True)):
            if old.get("weight") != new["weight"]:
                found.append(f"{self._mixed_by.format(i)} was {old.get('weight')}, is {new['weight']}")
            if old.get("fingerprint") != new["fingerprint"]:
                found.append(
                    f"data.sources[{i}].path {new['path']}: the data have changed "
                    f"(fingerprint was {str(old.get('fingerprint'))[:12]}, is {new['fingerprint'][:12]})"
                )
        return found


class HeldOut:
    """Blocks [sequence_length + 1] of the held-out split, unshuffled, remainder dropped; may be empty."""

    def __init__(self, documents: Documents, sequence_length: int) -> None:
        self._documents = documents
        self._block = sequence_length + 1
        self._epoch = _Epoch(np.arange(len(documents), dtype=np.uint32), np.cumsum(documents.lengths))

    def __len__(self) -> int:
        return self._documents.tokens // self._block

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        if not 0 <= number < len(self):
            raise IndexError(f"block {number} of {len(self)}")
        return _cut(self._documents, self._epoch, number * self._block, self._block)


def _open(source: DataSource, number: int, verify: bool) -> Corpus:
    try:
        return Corpus(local_copy(source.path), verify)
    except (DataError, StorageError) as error:
        raise DataError(f"data.sources[{number}].path: {error}") from None
