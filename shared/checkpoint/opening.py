"""Opens a checkpoint of any form: a model's files, a folder, a file, or a description."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.checkpoint.contract import Checkpoint, CheckpointError
from shared.checkpoint.cut_tables import MEGATRON, table_for
from shared.checkpoint.cuts import CutTable, Sizes
from shared.checkpoint.description import Description, parse_description
from shared.checkpoint.flat import FORMAT, TABLE_NAME, FlatCheckpoint
from shared.checkpoint.gguf import GgufCheckpoint
from shared.checkpoint.injected import InjectedCheckpoint, is_injected
from shared.checkpoint.joined import JoinedCheckpoint
from shared.checkpoint.megatron import is_megatron, megatron_checkpoint, version_of
from shared.checkpoint.metadata import read_metadata
from shared.checkpoint.mp_checkpoint import CONFIG_NAME
from shared.checkpoint.pickle import SUFFIXES, PickleCheckpoint, check_allowed
from shared.checkpoint.safetensors import SafetensorsCheckpoint, check_index
from shared.checkpoint.tensor_parallel import TensorParallelCheckpoint
from shared.checkpoint.training_folder import TrainingFile, rank_files, read_training_files, tagged
from shared.model_files import ModelFiles, Weights, find_weights

_INDEX = ".index.json"


def open_any(
    source: Path | str | Mapping[str, object],
    *,
    tag: str | None = None,
    base_dir: str = "",
    allow_pickle: bool = False,
    sizes: Sizes | None = None,
    table: CutTable | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Checkpoint:
    """The whole model, or what rank `rank` of `ranks` has of it, whatever form it lies in.

    source: a folder (safetensors index or files, GGUF, pickle; DeepSpeed's training folder; what `save_mp_checkpoint`
    or `save_flat` wrote), a file (.safetensors, .gguf, .pt, .bin, …), or a description (description.py): a JSON file or
    a dictionary.
    tag: which checkpoint of a training folder; None = the one that `latest` names.
    base_dir: where a description's files lie, if it does not say.
    sizes: heads and vocabulary, where shards are joined or cut; None = what the description or config.json says.
    table: how parameters are cut (cuts.py); None = what the description says, or the layout whose names these are.

    Raises CheckpointError, or the ModelError of a folder without weights, naming the file and the parameter; for pickle
    unless `allow_pickle`.
    """
    opener = _Opener(allow_pickle, sizes, table, rank, ranks)
    if isinstance(source, Mapping):
        return opener.description(source, Path.cwd(), base_dir)
    path = Path(source)
    if path.is_dir():
        return opener.folder(tagged(path, tag), base_dir)
    if tag is not None:
        raise CheckpointError(f"{path} is no folder, so it has no tag {tag!r}")
    if not path.is_file():
        raise CheckpointError(f"there is no {path}")
    if path.name.endswith(_INDEX):
        return opener.folder(path.parent, base_dir)
    if path.suffix == ".json":
        return opener.json(path, base_dir)
    return opener.cut(opener.file(path), path.parent)


def open_checkpoint(files: ModelFiles, *, allow_pickle: bool = False) -> Checkpoint:
    """Raises CheckpointError for files that cannot be read, and for pickle unless `allow_pickle`."""
    return _of_weights(files.weights, allow_pickle)


class _Opener:
    """What is the same for each file of a checkpoint."""

    def __init__(self, allow_pickle: bool, sizes: Sizes | None, table: CutTable | None, rank: int, ranks: int) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be one of {ranks}, got {rank}")
        self._allow_pickle, self._sizes, self._table, self._rank, self._ranks = allow_pickle, sizes, table, rank, ranks

    def folder(self, folder: Path, base_dir: str) -> Checkpoint:
        if (folder / CONFIG_NAME).is_file():
            return self.json(folder / CONFIG_NAME, base_dir)
        if (folder / TABLE_NAME).is_file():
            return self.cut(FlatCheckpoint(folder), folder)
        if paths := rank_files(folder):
            return self._training(read_training_files(paths, allow_pickle=self._allow_pickle), folder)
        return self.cut(_of_weights(find_weights(folder, allow_pickle=self._allow_pickle), self._allow_pickle), folder)

    def json(self, path: Path, base_dir: str) -> Checkpoint:
        data = read_metadata(path)
        if data.get("format") == FORMAT:
            return self.cut(FlatCheckpoint(path.parent), path.parent)
        return self.description(data, path.parent, base_dir)

    def file(self, path: Path) -> Checkpoint:
        if path.suffix == ".safetensors":
            return SafetensorsCheckpoint((path,))
        if path.suffix == ".gguf":
            return GgufCheckpoint(path)
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path} is no .safetensors, .gguf, .json or {', '.join(SUFFIXES)}")
        check_allowed(path, self._allow_pickle)
        return PickleCheckpoint((path,))

    def description(self, data: Mapping[str, object], folder: Path, base_dir: str) -> Checkpoint:
        described = parse_description(data, folder, base_dir)
        if described.type == "megatron":
            return self._megatron(described, folder)
        whole = JoinedCheckpoint([self.file(path) for path in described.whole])
        if not described.tp:
            return self.cut(whole, folder, described)
        shards: list[Checkpoint] = [JoinedCheckpoint([self.file(path) for path in files]) for files in described.tp]
        parts = [self.cut(shards, folder, described)]
        if whole.names():
            parts.append(self.cut(whole, folder, described))
        return JoinedCheckpoint(parts)

    def cut(
        self, shards: Checkpoint | Sequence[Checkpoint], folder: Path, described: Description | None = None
    ) -> Checkpoint:
        """This rank's part of shards."""
        shards = list(shards) if isinstance(shards, Sequence) else [shards]
        if is_injected(shards[0].names()):
            shards = [InjectedCheckpoint(shard) for shard in shards]
        if len(shards) == self._ranks == 1:
            return shards[0]
        own = described.table if described else None
        table = own or self._table or table_for(shards[0].names())
        sized = table if own else table.sized(self._known_sizes(folder, described))
        return TensorParallelCheckpoint(shards, sized, self._rank, self._ranks)

    def _training(self, files: Sequence[TrainingFile], folder: Path) -> Checkpoint:
        shards = [file.state for file in files]
        if not is_megatron(shards[0].names()):
            return self.cut(shards, folder)
        return self._merged(shards, files[0].version, self._known_sizes(folder, None))

    def _megatron(self, described: Description, folder: Path) -> Checkpoint:
        paths = tuple(path for files in described.tp for path in files)
        sizes = self._known_sizes(folder, described)
        if all(path.suffix == ".safetensors" for path in paths):
            return self._merged([self.file(path) for path in paths], described.version or 0, sizes)
        files = read_training_files(paths, allow_pickle=self._allow_pickle)
        said, stored = described.version, files[0].version
        # a file without a version is 0, or was written by DeepSpeed, which leaves it out
        if said is not None and stored and version_of(said) != version_of(stored):
            raise CheckpointError(
                f"the checkpoint description says version {said}, but {paths[0]} has checkpoint_version {stored}: "
                "their rows of query_key_value have another order"
            )
        return self._merged([file.state for file in files], stored if said is None else said, sizes)

    def _merged(self, shards: Sequence[Checkpoint], version: object, sizes: Sizes) -> Checkpoint:
        return megatron_checkpoint(
            shards, version, sizes=sizes, table=self._table or MEGATRON, rank=self._rank, ranks=self._ranks
        )

    def _known_sizes(self, folder: Path, described: Description | None) -> Sizes:
        """Those that were given, else the description's, else those of a config.json beside the files."""
        if self._sizes is not None:
            return self._sizes
        if described and described.sizes != Sizes():
            return described.sizes
        config = folder / "config.json"
        try:
            return Sizes.of_config(read_metadata(config)) if config.is_file() else Sizes()
        except ValueError as error:
            raise CheckpointError(f"{config}: {error}") from error


def _of_weights(weights: Weights, allow_pickle: bool) -> Checkpoint:
    paths = weights.paths
    if weights.kind == "safetensors":
        checkpoint = SafetensorsCheckpoint(paths)
        index = paths[0].parent / f"model.safetensors{_INDEX}"
        if index.exists():
            check_index(index, checkpoint)
        return checkpoint
    if weights.kind == "gguf":
        return GgufCheckpoint(paths[0])
    for path in paths:
        check_allowed(path, allow_pickle)
    return PickleCheckpoint(paths)
