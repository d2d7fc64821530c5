"""The crash at every write and every deletion, and two writers in any order: nothing lost, nothing twice, nothing half."""

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meteor import storage
from meteor.cache import (
    CacheIdentity,
    FeatureCache,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    pins,
    record_quarantine,
    write_feature_file,
)
from meteor.cache.ledger import ledger_names, read_record
from meteor.cache.manifest import latest_manifest, read_keys
from meteor.cache.pins import unpin
from meteor.cache.upkeep.gc import plan_gc, run_gc
from meteor.cache.upkeep.repair import repair
from meteor.errors import AlreadyExistsError, NotFoundError
from meteor.features import ImageFeatures

ROOT = "/memory"
NARROW, WIDE = (-2,), (-2, -5)


class Crash(BaseException):
    """No code may catch it, as none catches kill -9."""


class MemoryStore:
    """Files in memory under the names of `meteor.storage`; remembers its state after each write and deletion."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, float]] = {}
        self.clock_s = 0.0
        self.states: list[dict[str, tuple[bytes, float]]] = []
        self.num_until_crash: int | None = None
        self.before_create: Callable[[], None] | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("read_bytes", "read_range_into", "write_bytes", "create_bytes", "stat", "delete", "list_objects"):
            monkeypatch.setattr(storage, name, getattr(self, name))
        monkeypatch.setattr(storage, "now_s", lambda uri: self.clock_s)
        monkeypatch.setattr(storage, "delete_leftovers", lambda uri, older_than_s, dry_run: [])

    def read_bytes(self, uri: str) -> bytes:
        if uri not in self.files:
            raise NotFoundError(f"{uri} does not exist")
        return self.files[uri][0]

    def read_range_into(self, uri: str, start: int, buffer: memoryview) -> None:
        buffer[:] = self.read_bytes(uri)[start : start + len(buffer)]

    def write_bytes(self, uri: str, data: bytes) -> None:
        with self._change():
            self.files[uri] = (bytes(data), self.clock_s)

    def create_bytes(self, uri: str, data: bytes) -> None:
        hook, self.before_create = self.before_create, None
        if hook:
            hook()
        if uri in self.files:
            raise AlreadyExistsError(f"{uri} exists already")
        self.write_bytes(uri, data)

    def delete(self, uri: str) -> None:
        with self._change():
            self.files.pop(uri, None)

    def stat(self, uri: str) -> storage.ObjectInfo:
        data = self.read_bytes(uri)
        return storage.ObjectInfo(uri, len(data), hashlib.md5(data).hexdigest(), self.files[uri][1])

    def list_objects(self, prefix_uri: str) -> list[storage.ObjectInfo]:
        return [self.stat(uri) for uri in sorted(self.files) if uri.startswith(f"{prefix_uri}/")]

    @contextmanager
    def _change(self) -> Iterator[None]:
        if self.num_until_crash is not None:
            if self.num_until_crash == 0:
                raise Crash
            self.num_until_crash -= 1
        self.clock_s += 1
        yield
        self.states.append(dict(self.files))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    made = MemoryStore()
    made.install(monkeypatch)
    # Deletions one after the other, so that a state stands for one moment.
    monkeypatch.setattr("meteor.cache.upkeep.gc._NUM_DELETERS", 1)
    return made


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


@functools.cache
def image(name: str, layers: tuple[int, ...] = NARROW) -> ImageFeatures:
    numbers = torch.Generator().manual_seed(len(name) + ord(name[0]))
    return ImageFeatures(
        image_key=key_of(name),
        width=64,
        height=48,
        grid=None,
        patch_grids=((2, 3),),
        attention_layers=layers,
        features=[torch.randn(6, 4, generator=numbers)],
        cls_attention=[torch.rand(len(layers), 6, generator=numbers)],
        cls=torch.randn(1, 4, generator=numbers),
    )


@functools.cache
def encoded(name: str, layers: tuple[int, ...]) -> object:
    return encode_row(image(name, layers), get_codec("float16"))


def make_cache() -> str:
    identity = CacheIdentity(
        encoder_digest="e" * 64,
        encoder_dtype="float32",
        select_layer=-2,
        preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3, "rescale": "1/255"},
        slicing={"max_slices": 6, "resolution": 336, "patch_size": 14},
    )
    return create_cache(ROOT, identity, "float16")


def write(cache_uri: str, *names: str, layers: tuple[int, ...] = NARROW) -> None:
    write_feature_file(cache_uri, [encoded(name, layers) for name in names])


def collect(cache_uri: str, older_than_s: float = 0.0) -> None:
    run_gc(plan_gc(cache_uri, older_than_s=older_than_s))


def served(cache_uri: str, version: int | None = None) -> dict[str, dict]:
    """The rows of a version by image key."""
    cache = FeatureCache.open(cache_uri, version=version)
    rows = {row["image_key"]: row for row in read_keys(cache_uri, cache.manifest).to_pylist()}
    assert list(rows) == cache.keys()
    return rows


def check_reading(cache_uri: str, damaged: Collection[tuple[str, int]], version: int | None = None) -> None:
    """Every image of the version can be read and is the right one."""
    cache = FeatureCache.open(cache_uri, version=version)
    names = {key_of(name): name for name in "abcdefgh"}
    for key, row in served(cache_uri, cache.version).items():
        if (row["file"], row["row_group"]) not in damaged:
            layers = tuple(row["attention_layers"])
            expected = image(names[key], layers).features[0].half()
            assert torch.equal(cache.get(key, attention_layers=layers).features[0], expected)


def damage(store: MemoryStore, cache_uri: str, name: str) -> tuple[str, int]:
    """Flip a byte of the features that the latest version serves. Gives file and row group."""
    row = served(cache_uri)[key_of(name)]
    uri = f"{cache_uri}/{row['file']}"
    data, modified_s = store.files[uri]
    changed = bytearray(data)
    changed[row["features_offset"] + 1] ^= 4
    store.files[uri] = (bytes(changed), modified_s)
    return row["file"], row["row_group"]


WANTED = {"a": WIDE, "b": NARROW, "c": NARROW, "d": NARROW, "e": NARROW}


def run_session(store: MemoryStore) -> tuple[str, tuple[str, int]]:
    """All that can happen to a cache. Gives its URI and the row that was damaged on the way."""
    cache_uri = make_cache()
    write(cache_uri, "a", "b")
    write(cache_uri, "b", "c")
    record_quarantine(
        cache_uri, [QuarantineRow("", "bad.png", "empty", ""), QuarantineRow(key_of("e"), "", "missing", "")]
    )
    assert commit(cache_uri) == 1
    FeatureCache.open(cache_uri).pin("run", {})
    write(cache_uri, "d", "e")
    write(cache_uri, "a", layers=WIDE)
    assert commit(cache_uri) == 2
    bad = damage(store, cache_uri, "c")
    assert repair(cache_uri).dropped == (key_of("c"),)
    write(cache_uri, "c")
    assert commit(cache_uri) == 4
    collect(cache_uri)
    unpin(cache_uri, "run")
    collect(cache_uri)
    collect(cache_uri)
    assert commit(cache_uri) == latest_manifest(cache_uri) == 5
    assert plan_gc(cache_uri, older_than_s=0).is_empty
    return cache_uri, bad


def resume(cache_uri: str) -> list[str]:
    """The job, started again from its beginning. Gives the images that it encoded."""
    make_cache()
    commit(cache_uri)
    missing = dict(WANTED)
    if latest_manifest(cache_uri):
        repair(cache_uri)
        cache = FeatureCache.open(cache_uri)
        missing = {
            name: layers for name, layers in WANTED.items() if key_of(name) not in cache.keys_with_attention(layers)
        }
        bad = cache.quarantined()
    if not latest_manifest(cache_uri) or "bad.png" not in bad:
        record_quarantine(cache_uri, [QuarantineRow("", "bad.png", "empty", "")])
    for name, layers in missing.items():
        write(cache_uri, name, layers=layers)
    commit(cache_uri)
    return list(missing)


def recorded(cache_uri: str, damaged: tuple[str, int]) -> set[str]:
    """The images that finished files hold as they are wanted."""
    records = [read_record(cache_uri, name) for name in ledger_names(cache_uri) if name.startswith("features-")]
    rows = [row for record in records for row in record.to_pylist() if (row["file"], row["row_group"]) != damaged]
    return {
        name
        for name, layers in WANTED.items()
        for row in rows
        if row["image_key"] == key_of(name) and set(layers) <= set(row["attention_layers"])
    }


def test_after_a_crash_at_any_write_or_deletion_a_restart_ends_with_everything_once(store: MemoryStore) -> None:
    cache_uri, damaged = run_session(store)
    assert len(store.states) > 40
    for state in [{}, *store.states]:
        store.files = dict(state)
        for version in visible_versions(store, cache_uri):
            check_reading(cache_uri, {damaged}, version)
        finished = recorded(cache_uri, damaged)
        again = finished.intersection(resume(cache_uri))
        assert not again, f"encoded again: {again}"
        # The second run deletes the files whose rows the first one moved.
        collect(cache_uri)
        collect(cache_uri)
        check_pin(cache_uri, damaged)
        check_end(cache_uri)
        assert plan_gc(cache_uri, older_than_s=0).is_empty


def visible_versions(store: MemoryStore, cache_uri: str) -> list[int]:
    return [int(uri[-13:-5]) for uri in store.files if uri.startswith(f"{cache_uri}/manifests/")]


def check_pin(cache_uri: str, damaged: tuple[str, int]) -> None:
    for pin in pins(cache_uri):
        assert len(FeatureCache.open(cache_uri, version=pin["manifest_version"])) == 3
        check_reading(cache_uri, {damaged}, version=pin["manifest_version"])


def check_end(cache_uri: str) -> None:
    cache = FeatureCache.open(cache_uri)
    rows = served(cache_uri)
    assert {key: tuple(row["attention_layers"]) for key, row in rows.items()} == {
        key_of(name): layers for name, layers in WANTED.items()
    }
    assert cache.quarantined() == {"bad.png": "empty"}
    assert cache.verify() == []


OPERATIONS: dict[str, Callable[[str], object]] = {"commit": commit, "repair": repair, "gc": collect}


class TwoWriters(RuleBasedStateMachine):
    """Writers, readers and the clean-up in any order, against a dict from image to attention layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.store = MemoryStore()
        self.store.install(self.patches)
        self.cache_uri = make_cache()
        self.pending: list[tuple[str, tuple[int, ...]]] = []
        self.model: dict[str, tuple[int, ...]] = {}
        self.bad: dict[str, str] = {}
        self.pending_bad: dict[str, str] = {}
        self.pinned: dict[str, tuple[int, set[str]]] = {}
        self.damaged: set[tuple[str, int]] = set()

    def teardown(self) -> None:
        self.patches.undo()

    @initialize()
    def begin(self) -> None:
        self.write({"a"}, NARROW)
        self.commit()

    @rule(names=st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3), layers=st.sampled_from([NARROW, WIDE]))
    def write(self, names: set[str], layers: tuple[int, ...]) -> None:
        write(self.cache_uri, *sorted(names), layers=layers)
        self.pending += [(name, layers) for name in names]

    @rule(name=st.sampled_from("abcdef"), reason=st.sampled_from(["missing", "truncated"]))
    def quarantine(self, name: str, reason: str) -> None:
        # Of two pending reasons for one image the order is chance.
        if name not in self.pending_bad:
            record_quarantine(self.cache_uri, [QuarantineRow(key_of(name), name, reason, "")])
            self.pending_bad[name] = reason

    @rule()
    def commit(self) -> None:
        version = commit(self.cache_uri)
        assert version == latest_manifest(self.cache_uri)
        self._merge()

    @rule(names=st.sets(st.sampled_from("abcdef"), min_size=1, max_size=2))
    def commit_while_another_writer_does(self, names: set[str]) -> None:
        def other() -> None:
            self.write(names, NARROW)
            commit(self.cache_uri)

        self.store.before_create = other
        commit(self.cache_uri)
        self.store.before_create = None
        commit(self.cache_uri)
        self._merge()

    @rule(run=st.sampled_from(["r1", "r2"]))
    def pin(self, run: str) -> None:
        cache = FeatureCache.open(self.cache_uri)
        cache.pin(run, {})
        self.pinned.setdefault(run, (cache.version, set(cache.keys())))

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        run = min(self.pinned)
        unpin(self.cache_uri, run)
        del self.pinned[run]

    @precondition(lambda self: self.model)
    @rule(choice=st.integers(0, 5))
    def damage(self, choice: int) -> None:
        row = served(self.cache_uri)[key_of(sorted(self.model)[choice % len(self.model)])]
        if (row["file"], row["row_group"]) not in self.damaged:
            self.damaged.add(damage(self.store, self.cache_uri, sorted(self.model)[choice % len(self.model)]))

    @rule()
    def repair(self) -> None:
        damaged = self._damaged_names()
        done = repair(self.cache_uri)
        assert set(done.dropped) == {key_of(name) for name in damaged}
        if damaged:
            for name in damaged:
                del self.model[name]
            self._merge()
        assert FeatureCache.open(self.cache_uri).verify() == []
        assert repair(self.cache_uri).version == done.version

    @rule(older_than_s=st.sampled_from([0.0, 8.0, 1000.0]))
    def collect(self, older_than_s: float) -> None:
        before = latest_manifest(self.cache_uri)
        collect(self.cache_uri, older_than_s)
        if latest_manifest(self.cache_uri) > before:
            self._merge()

    @rule(
        what=st.sampled_from(sorted(OPERATIONS)),
        num_writes=st.integers(0, 12),
    )
    def crash(self, what: str, num_writes: int) -> None:
        dropped = self._damaged_names()
        self.store.num_until_crash = num_writes
        try:
            OPERATIONS[what](self.cache_uri)
        except Crash:
            pass
        finally:
            self.store.num_until_crash = None
        commit(self.cache_uri)
        held = {name for name in "abcdef" if key_of(name) in served(self.cache_uri)}
        for name in dropped:
            if name not in held or name not in self._damaged_names():
                del self.model[name]
        self._merge()

    @invariant()
    def the_latest_version_is_the_model(self) -> None:
        if not latest_manifest(self.cache_uri):
            return
        rows = served(self.cache_uri)
        held = {key: tuple(row["attention_layers"]) for key, row in rows.items()}
        assert held == {key_of(name): layers for name, layers in self.model.items()}
        assert FeatureCache.open(self.cache_uri).quarantined() == {key_of(name): why for name, why in self.bad.items()}
        check_reading(self.cache_uri, self.damaged)

    @invariant()
    def pinned_versions_stay(self) -> None:
        for version, keys in self.pinned.values():
            assert set(FeatureCache.open(self.cache_uri, version=version).keys()) == keys
            check_reading(self.cache_uri, self.damaged, version)

    def _damaged_names(self) -> list[str]:
        rows = served(self.cache_uri) if latest_manifest(self.cache_uri) else {}
        places = {name: rows.get(key_of(name)) for name in self.model}
        return [name for name, row in places.items() if row and (row["file"], row["row_group"]) in self.damaged]

    def _merge(self) -> None:
        for name, layers in self.pending:
            self.model[name] = max(self.model.get(name, ()), layers, key=len)
        self.bad |= self.pending_bad
        self.bad = {name: reason for name, reason in self.bad.items() if name not in self.model}
        self.pending, self.pending_bad = [], {}


TwoWriters.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
test_two_writers_and_the_clean_up_in_any_order_agree_with_a_dict = TwoWriters.TestCase
