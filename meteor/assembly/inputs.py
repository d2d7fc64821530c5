"""Settings of a run with the files, versions and models that they name, each read once per command."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from meteor import storage
from meteor.assembly.encoders import cache_identity, load_encoder
from meteor.assembly.places import SampleFile, cache_uri, index_uri, sample_files, samples_uri, training_files
from meteor.assembly.sample_sets import as_samples, distinct_images, mix, mixture_digest
from meteor.cache import CacheIdentity, DatasetIndex, FeatureCache
from meteor.cache.manifest import latest_manifest
from meteor.config import RunSettings, settings_digest
from meteor.data.sample_sets import SampleSet, load_set
from meteor.errors import CacheError, SettingsError
from meteor.evaluation.question_set import QuestionSet, load_question_set
from meteor.progress import ProgressLog
from meteor.projector.file import projector_digest
from meteor.runs import pins
from meteor.runs.identity import Versions
from meteor.stages import TrainingStage
from meteor.text.tokenizer import load_tokenizer
from meteor.train.build import llm_fingerprint

T = TypeVar("T")


class Inputs:
    """Settings of a run, and what they name; the `Facts` of `meteor.runs.identity`.

    A command makes one instance and gets those of other runs from `of`, so that no file is read or hashed twice, however many
    stages and variants need it. Threads may share instances. Versions that a stage publishes later are seen after `refresh`.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self._store = _Store()

    def of(self, settings: RunSettings) -> "Inputs":
        """Return the inputs of another run, which knows everything that was read before."""
        inputs = Inputs(settings)
        inputs._store = self._store
        return inputs

    def refresh(self) -> None:
        """Forget the newest versions of indexes and caches, so that they are looked up again."""
        with self._store.lock:
            self._store.newest.clear()

    # Samples and questions

    def sample_set(self, name: str, uri: str) -> SampleSet:
        """Read an annotation file; for errors see `meteor.data.sample_sets.load_set`."""
        folder = samples_uri(self.settings)

        def read() -> SampleSet:
            progress = ProgressLog(f"{name}: reading: samples")
            return load_set(uri, name=name, folder=folder, on_progress=progress)

        return replace(self.once(("samples", uri, folder), read), name=name)

    def training_sets(self, stage: TrainingStage) -> list[SampleSet]:
        """Read the files that a stage trains on; their order depends on their content alone.

        Raises:
            SettingsError: the run names no file, or names one file twice.
        """
        files = training_files(self.settings, stage)
        if not files:
            raise SettingsError(f"data.{stage} is not set: name the samples of this stage")
        key = ("mixture", stage, tuple((file.uri, file.weight) for file in files), samples_uri(self.settings))
        return self.once(key, lambda: mix(stage, [self._weighted(file) for file in files]))

    def _weighted(self, file: SampleFile) -> SampleSet:
        return replace(self.sample_set(file.name, file.uri), weight=file.weight)

    def all_sets(self) -> list[SampleSet]:
        """Read all sample sets of the run, with the samples of its questions.

        Raises:
            SettingsError: the run names no samples.
        """
        files = [file for file in sample_files(self.settings) if file.stage is not None]
        sets = [self.sample_set(file.name, file.uri) for file in files]
        return sets + [as_samples(questions) for questions in self.question_sets()]

    def question_sets(self) -> list[QuestionSet]:
        """Read all question sets of the run; empty if it names none."""
        return [self.question_set(name) for name in self.settings.data.evaluate]

    def question_set(self, name: str) -> QuestionSet:
        """Read a question set of the run; for errors see `meteor.evaluation.question_set.load_question_set`."""
        options = self.settings.data.evaluate[name]
        arguments = {
            **options.model_dump(exclude={"path"}),
            "uri": options.path,
            "embedded_root": storage.join(self.settings.cache_root, "question_images"),
            "preset": self.settings.evaluate.preset,
            "long_side": self.settings.evaluate.long_side,
        }
        key = ("questions", name, settings_digest(arguments))
        return self.once(key, lambda: load_question_set(name, **arguments))

    def image_roots(self) -> dict[str, str]:
        """Return the run's image roots, the folders that ``@<question set>/`` stands for, and files with images inside.

        Raises:
            SettingsError: two sets are copies of one another in different places, so that it is open which images count.
        """
        sets = self.question_sets()
        own = {questions.prefix: questions.image_root for questions in sets if questions.image_root is not None}
        for file in sample_files(self.settings):
            inside = self.sample_set(file.name, file.uri).inside_root if file.stage is not None else {}
            for prefix, root in inside.items():
                if own.setdefault(prefix, root) != root:
                    raise SettingsError(
                        f"{root} and {own[prefix]} are copies of one data set: name one of them everywhere"
                    )
        return {**self.settings.data.roots, **own}

    # Index and cache

    def cache_identity(self) -> CacheIdentity:
        """Return the identity of the run's feature cache; for errors see `load_encoder`."""
        key = ("cache", self.settings.vision.model_dump_json(), self.settings.slicing.model_dump_json())
        # The encoder itself is not kept: it takes more than a gigabyte.
        return self.once(key, lambda: cache_identity(self.settings, load_encoder(self.settings)))

    def cache_uri(self) -> str:
        """Return the URI of the cache that the run reads and fills, in the run's codec."""
        return cache_uri(self.settings, self.cache_identity())

    def index(self) -> DatasetIndex:
        """Open the version of the dataset index that a stage would read if it started now.

        Raises:
            CacheError: cache_features has not run.
        """
        uri, version = index_uri(self.settings), self.settings.cache.index_version
        if version is None:
            version = self._store.once(("index", uri), lambda: DatasetIndex.latest_version(uri), newest=True)
        if not version:
            raise CacheError(f"there is no dataset index at {uri}: run cache_features first")
        return self.index_version(version)

    def index_version(self, version: int) -> DatasetIndex:
        """Open a published version of the dataset index."""
        uri = index_uri(self.settings)
        return self.once(("index", uri, version), lambda: DatasetIndex.open(uri, version))

    def cache_version(self) -> int:
        """Return the version of the cache that a stage would read if it started now.

        Raises:
            CacheError: cache_features has not run.
        """
        uri = self.cache_uri()
        version = self.settings.cache.version
        if version is None:
            version = self._store.once(("cache", uri), lambda: latest_manifest(uri), newest=True)
        if not version:
            raise CacheError(f"there is no feature cache at {uri}: run cache_features with these settings first")
        return version

    def cache(self) -> FeatureCache:
        """Open the feature cache at the version of `cache_version`."""
        return self.cache_at(self.cache_version())

    def cache_at(self, version: int) -> FeatureCache:
        """Open a published version of the run's feature cache."""
        uri = self.cache_uri()
        return self.once(("open cache", uri, version), lambda: FeatureCache.open(uri, version=version))

    def index_digest(self, index: DatasetIndex, sets: Sequence[SampleSet]) -> str:
        """Return the digest of the sets' images in a version of the index; for errors see `DatasetIndex.digest`."""
        # The URI belongs to the key: image names in a question set's own folder begin with the set's name.
        key = ("index digest", index.uri, index.version, *sorted({(file.digest, file.uri) for file in sets}))
        return self.once(key, lambda: index.digest(distinct_images(sets)))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the language model's tokenizer; for errors see `load_tokenizer`."""
        path = self.settings.llm.path
        return self.once(("tokenizer", path), lambda: load_tokenizer(path))

    # Facts, for `meteor.runs.identity.identify`

    def all_samples(self) -> list[str]:
        return sorted(file.digest for file in self.all_sets())

    def training_samples(self, stage: TrainingStage) -> str:
        return mixture_digest(self.training_sets(stage))

    def questions(self) -> dict[str, str]:
        return {questions.name: questions.scoring_digest for questions in self.question_sets()}

    def cache_key(self) -> str:
        return self.cache_identity().key

    def llm(self) -> str:
        path = self.settings.llm.path
        return self.once(("llm", path), lambda: llm_fingerprint(path))

    def projector(self) -> str:
        uri = self.settings.finetune.pretrained
        assert uri is not None, "the run names a projector"
        return self.once(("projector", uri), lambda: projector_digest(uri))

    def model(self) -> str:
        uri = self.settings.evaluate.model
        assert uri is not None, "the run names a model"
        return self.once(("model", uri), lambda: _model_digest(uri))

    def choose_versions(self, stage: TrainingStage, content: Mapping[str, Any]) -> Versions | None:
        try:
            current = self.current_versions(stage)
        except CacheError:
            return None
        return pins.choose_versions(self.settings, stage, content, current)

    def current_versions(self, stage: TrainingStage) -> Versions:
        """Return the versions that a training stage without a pin would read if it started now.

        Raises:
            CacheError: cache_features has not run, or not over all of the stage's images.
        """
        index = self.index()
        digest = self.index_digest(index, self.training_sets(stage))
        return Versions(index.version, digest, self.cache_version())

    def question_images(self) -> dict[str, str] | None:
        try:
            index = self.index()
            sets = [as_samples(questions) for questions in self.question_sets()]
            return {questions.name: self.index_digest(index, [questions]) for questions in sets}
        except CacheError:
            return None

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return the value of a key, which the first call of a command makes; the key holds all that the value depends on."""
        return self._store.once(key, make)


class _Store:
    """Values by key, each made once; the newest versions are apart from those that never change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.newest: dict[tuple[Any, ...], Any] = {}
        self._lasting: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], T], *, newest: bool = False) -> T:
        known = self.newest if newest else self._lasting
        with self.lock:
            if key not in known:
                known[key] = make()
            return known[key]


def _model_digest(uri: str) -> str:
    files = {info.uri.removeprefix(uri): [info.size_bytes, info.copied_etag] for info in storage.list_objects(uri)}
    if not files:
        raise SettingsError(f"evaluate.model={uri!r} holds no model: give the model directory that finetune writes")
    return settings_digest(files)
