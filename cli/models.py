"""`tandem model pull|list|show|remove`, and the progress bar of a pull."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from shared.model_files import ModelFiles, ModelNotFoundError
from shared.model_source import Progress as OnProgress
from shared.model_store import ModelStore, ModelSummary


def ensure_model(model: str, *, allow_pickle: bool = False) -> str:
    """Makes sure that a process can load `model` without a network; returns the name or path to load it by.

    Raises ModelError.
    """
    store = ModelStore()
    try:
        store.resolve(model, allow_pickle=allow_pickle)
        return model
    except ModelNotFoundError:
        with progress_bar() as progress:
            return store.pull(model, progress, allow_pickle=allow_pickle).name


def pull(source: str, *, name: str | None, allow_pickle: bool) -> None:
    """Fetches a model unless it is here. Raises ModelError."""
    with progress_bar() as progress:
        files = ModelStore().pull(source, progress, name=name, allow_pickle=allow_pickle)
    _print(files)


def list_all(*, as_json: bool) -> None:
    """A line for each pulled model."""
    models = ModelStore().list()
    if as_json:
        print(json.dumps([asdict(model) for model in models], default=str))
        return
    table = Table("name", "size", "weights", "pulled", "source", box=None, header_style="bold")
    for model in models:
        day = time.strftime("%Y-%m-%d", time.localtime(model.pulled_at))
        table.add_row(model.name, _size(model.num_bytes), model.kind, day, model.source)
    Console().print(table if models else "no model is here; `tandem model pull` fetches one")


def show(name: str, *, as_json: bool) -> None:
    """All that the store knows of a model. Raises ModelError."""
    _print(ModelStore().show(name), as_json=as_json)


def remove(name: str) -> None:
    """Deletes a model. Raises ModelError."""
    print(f"removed {name}, {_size(ModelStore().remove(name))}")


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A callback that draws a bar on standard error for each thing that is being done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def update(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        yield update


def _print(model: ModelSummary | ModelFiles, *, as_json: bool = False) -> None:
    if isinstance(model, ModelFiles):
        print(f"{model.name} is in {model.folder}")
        return
    if as_json:
        print(json.dumps(asdict(model), default=str))
        return
    for key, value in asdict(model).items():
        print(f"{key:<10} {value}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
