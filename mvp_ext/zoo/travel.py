"""Zoos travel: to a URL, from one, and two into one.

What lies at a URL is never changed but for the small manifest, which is put in place last (see ``manifest.py``). So
who pulls gets one snapshot whole, whatever is pushed meanwhile, and a push or a pull that was stopped goes on: what is
there is not moved again. Every file's SHA-256 is compared after it was moved.

    zoo/.origins.json   what of each URL this zoo had and pulled: nobody's models but those are taken away by either
    zoo/.incoming/      what a pull has fetched so far, laid out as a zoo is
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvp_ext.storage import sync_names, write_atomic, write_together
from mvp_ext.zoo.card import zoo_card
from mvp_ext.zoo.files import (
    BadFile,
    check_size,
    check_sound,
    forget,
    is_regular,
    read_regular,
    read_sound,
    remove_file,
)
from mvp_ext.zoo.index import ENTRY_COLUMNS, FILE_COLUMNS, MEANS_COLUMNS, Index, ZooError
from mvp_ext.zoo.layout import Layout
from mvp_ext.zoo.manifest import MANIFEST, Content, Item, Key, Manifest, describe, keys_of
from mvp_ext.zoo.remote import Remote
from mvp_ext.zoo.rowless import adopt
from mvp_ext.zoo.rows import file_name
from mvp_ext.zoo.zoo import Zoo

# Of more models an error names the first.
NAMED = 20
CARD, ORIGINS = "README.md", ".origins.json"
# progress(what is moved, files there by now, files in all)
Progress = Callable[[str, int, int], None]


# ---- push


def push_zoo(zoo: Zoo, url: str, *, replace: bool = False, progress: Progress | None = None) -> None:
    """Copy a zoo to a URL, with a card for people: a snapshot as of now, whoever adds meanwhile.

    Who pulls has the old snapshot until the last file is there, and then this one. Called again after it was stopped,
    it moves only what is missing. Files of earlier snapshots stay, as somebody may just be pulling them.

    Args:
        zoo: the zoo.
        url: a folder, by fsspec: a path, ``s3://…``, ``gs://…``, ``hf://…`` and others.
        replace: also where models are lost that others pushed there.
        progress: is told ``("files", done, total)``.

    Raises:
        ZooError: the store cannot be reached or has other bytes than it was given, a model of the zoo is damaged, or
            the URL has models that neither this zoo nor its last push or pull had; the message names them.
        ImportError: fsspec or the package of the URL's protocol is not installed.
    """
    remote = Remote(url)
    with tempfile.TemporaryDirectory(prefix="mvp_ext-push-") as folder:
        for number in itertools.count():
            snapshot = _snapshot(zoo, Path(folder) / f"{number}.sqlite")
            if _pushed(zoo, snapshot, remote, replace, progress):
                return


def _snapshot(zoo: Zoo, path: Path) -> Index:
    copy = zoo._index.copy_to(path)
    # Zoos of older versions have models without rows.
    adopt(zoo._layout, copy, copy.version())
    return copy


def _pushed(zoo: Zoo, snapshot: Index, remote: Remote, replace: bool, progress: Progress | None) -> bool:
    """False where a model was removed or replaced while others were moved: there is a later snapshot."""
    said = describe(snapshot, zoo._layout)
    index = snapshot.path.read_bytes()
    manifest = Manifest(_content(index), said.items)
    # What a pull would refuse is not pushed.
    written = manifest.to_bytes()
    Manifest.parse(written, f"zoo {zoo.path}")
    if not replace:
        _check_others_kept(zoo, remote, manifest)
    for item in _told(manifest.items, progress):
        if remote.size(item.remote) == item.content.bytes:
            continue
        path = item.path(zoo._layout)
        try:
            data = read_sound(path, item.content.sha256)
        except BadFile as error:
            if item.key not in keys_of(zoo._index):
                return False
            raise ZooError(
                f"zoo {zoo.path}: {item}: {path}: {error}; `mvp-ext zoo verify --repair` removes it"
            ) from error
        remote.write(item.remote, data)
    if remote.size(manifest.remote_index) != len(index):
        remote.write(manifest.remote_index, index)
    if not replace:
        # Somebody may have pushed meanwhile.
        _check_others_kept(zoo, remote, manifest)
    origin = _origin(zoo._layout, remote.url) or Origin()
    # Before and after: a kill in between must not make the zoo's own models look like those of others.
    _remember(zoo._layout, remote.url, origin._replace(had=origin.had | manifest.keys))
    _write_if_other(remote, MANIFEST, written)
    _remember(zoo._layout, remote.url, origin._replace(had=frozenset(manifest.keys)))
    _write_if_other(remote, CARD, zoo_card(said, remote.url, snapshot.meta()).encode())
    return True


def _write_if_other(remote: Remote, name: str, data: bytes) -> None:
    if remote.read(name) != data:
        remote.write(name, data)


def _check_others_kept(zoo: Zoo, remote: Remote, manifest: Manifest) -> None:
    if remote.size(zoo._layout.index.name) is not None:
        raise ZooError(f"{remote.url}: it is the directory of a zoo; name another folder")
    there = _manifest(remote)
    if there is None:
        if remote.size(CARD) is not None:
            raise ZooError(
                f"{remote.url}: it has a {CARD} and no zoo; name an empty folder, or replace the file (--force)"
            )
        return
    if lost := there.keys - manifest.keys - (_origin(zoo._layout, remote.url) or Origin()).had:
        raise ZooError(
            f"{remote.url}: it has what this zoo never had, and would be lost: {_named(lost)}; pull it into a new "
            f"directory and `mvp-ext zoo merge` that and {zoo.path}, or replace it (--force)"
        )


# ---- pull


def pull_zoo(url: str, path: str | os.PathLike[str], *, progress: Progress | None = None) -> Zoo:
    """Copy the zoo at a URL into a directory, or bring a directory that was pulled from there up to date.

    Models, facts, class means and all that the index says are then equal to what was pushed. Called again after it was
    stopped, it moves only what is missing; until all is there, and every checksum right, the directory's zoo is what it
    was. What comes from the URL is data: names of files outside the zoo's own folders are refused, and no code runs.

    Args:
        url: where ``push_zoo`` put it.
        path: a directory that is empty, new, or a zoo that was pulled from, or pushed to, this URL.
        progress: is told ``("files", done, total)``.

    Raises:
        ZooError: no zoo there, a file there is not what was pushed, or the directory has models of its own, which
            would be lost; the message names them.
        ImportError: fsspec or the package of the URL's protocol is not installed.
    """
    remote = Remote(url)
    manifest = _manifest(remote)
    if manifest is None:
        raise ZooError(f"{remote.url}: no zoo there: it has no {MANIFEST}; `mvp-ext zoo push` makes one")
    zoo = Zoo(path)
    layout = zoo._layout
    with layout.lock(exclusive=True):
        own = _checked_own(zoo, remote, manifest)
        staged = _incoming(layout)

        def fetch_index(draft: Path) -> None:
            _fetch(remote, manifest.remote_index, manifest.index, draft)

        def fetch(item: Item, draft: Path) -> None:
            _fetch(remote, item.remote, item.content, draft, f" ({item})")

        _bring(staged.index, manifest.index, fetch_index)
        index = Index(staged.index)
        if set(describe(index, layout).items) != set(manifest.items):
            raise ZooError(
                f"{remote.url}: {MANIFEST} names other models than the index does; push the zoo again"
            )
        _stage(zoo, staged, manifest.items, fetch, progress)
        origin, pulled = _origin(layout, remote.url) or Origin(), frozenset(manifest.keys - own)
        # Before and after: a kill in between must not make pulled models look like the zoo's own.
        _remember(layout, remote.url, origin._replace(pulled=origin.pulled | pulled))
        _install(zoo, staged, index, manifest.items)
        _remember(layout, remote.url, Origin(frozenset(manifest.keys), pulled))
        shutil.rmtree(staged.root, ignore_errors=True)
    return Zoo(path)


def _checked_own(zoo: Zoo, remote: Remote, manifest: Manifest) -> set[Key]:
    """The models that were made here; ZooError where one would be lost, or the zoo has nothing to do with the URL."""
    index, origin = zoo._index, _origin(zoo._layout, remote.url)
    models = keys_of(index)
    if origin is None and (models or index.facts() or index.meta()):
        raise ZooError(
            f"zoo {zoo.path}: it is no pull of {remote.url}; name a new directory, and `mvp-ext zoo merge` joins "
            "the two"
        )
    own = models - (origin or Origin()).pulled
    if lost := own - manifest.keys:
        raise ZooError(
            f"zoo {zoo.path}: it has models of its own, which would be lost: {_named(lost)}; push it first, or pull "
            "into a new directory and `mvp-ext zoo merge` the two"
        )
    return own


def _incoming(layout: Layout) -> Layout:
    staged = Layout(layout.root / ".incoming")
    try:
        if staged.root.is_symlink():
            raise ZooError(
                f"zoo {layout.root}: {staged.root.name}: expected a folder of its own, and no link"
            )
        for folder in (staged.root, staged.entries, staged.shared):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ZooError(f"zoo {layout.root}: it cannot be written ({error})") from error
    staged.check()
    return staged


def _fetch(remote: Remote, name: str, content: Content, draft: Path, whose: str = "") -> None:
    try:
        # Before it fills the disk.
        if (found := remote.size(name)) != content.bytes:
            got = "none" if found is None else f"{found}"
            raise BadFile("damaged", f"expected a file of {content.bytes} bytes, got {got}")
        remote.fetch(name, draft)
        check_size(draft, content.bytes)
        read_sound(draft, content.sha256)
    except BadFile as error:
        raise ZooError(
            f"{remote.url}: {name}{whose}: {error}; nothing was changed. Remove that file, and push the zoo again"
        ) from error
    finally:
        forget(draft)


def _manifest(remote: Remote) -> Manifest | None:
    data = remote.read(MANIFEST)
    return None if data is None else Manifest.parse(data, f"{remote.url}: {MANIFEST}")


# ---- merge


def merge_zoos(zoos: Sequence[Zoo], out: str | os.PathLike[str], *, progress: Progress | None = None) -> Zoo:
    """Make one zoo of several of one backbone. They stay as they are; the new one is there whole, or not at all.

    Models of one name and with equal bytes are one. Facts, settings among them, are the first zoo's, and of the others
    what it does not know.

    Args:
        zoos: at least two.
        out: a directory that is new or empty.
        progress: is told ``("files", done, total)``.

    Raises:
        ZooError: other backbones, structures or preprocessing; models of one name with different bytes, all named; a
            damaged model; ``out`` is not empty.
        ValueError: fewer than two zoos.
    """
    if len(zoos) < 2:
        raise ValueError(f"merge_zoos: expected at least two zoos, got {len(zoos)}")
    target = Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ZooError(f"{target}: expected a new or an empty directory to merge into")
    for first, other in itertools.combinations(zoos, 2):
        _check_alike(first, other)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    try:
        merged = Zoo(draft)
        staged = _incoming(merged._layout)
        index = _snapshot(zoos[0], staged.index)
        sources = {item: (zoos[0], item) for item in describe(index, zoos[0]._layout).items}
        for number, zoo in enumerate(zoos[1:]):
            sources |= _joined(index, sources, zoo, Path(draft / f".{number}.sqlite"))

        def copy(item: Item, file: Path) -> None:
            zoo, original = sources[item]
            try:
                file.write_bytes(read_sound(original.path(zoo._layout), item.content.sha256))
            except BadFile as error:
                raise ZooError(f"zoo {zoo.path}: {item}: {error}") from error

        items = describe(index, merged._layout).items
        _stage(merged, staged, items, copy, progress)
        _install(merged, staged, index, items)
        shutil.rmtree(staged.root)
        for path in draft.glob(".*.sqlite"):
            path.unlink()
        os.replace(draft, target)
    except OSError as error:
        raise ZooError(f"{target}: no zoo can be made here ({error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Zoo(target)


def _check_alike(first: Zoo, other: Zoo) -> None:
    known = first._index.meta()
    for key, got in other._index.meta().items():
        if known.get(key, got) != got:
            raise ZooError(
                f"zoo {other.path}: it is of another backbone than {first.path}: expected {key.replace('_', ' ')} "
                f"{known[key]}, got {got}"
            )
    if other.preprocessing is not None:
        first.check_preprocessing(other.preprocessing)


def _joined(
    index: Index, sources: dict[Item, tuple[Zoo, Item]], zoo: Zoo, path: Path
) -> dict[Item, tuple[Zoo, Item]]:
    """Put another zoo's rows into the index; returns whose its new models are."""
    snapshot = _snapshot(zoo, path)
    items = describe(snapshot, zoo._layout).items
    have = {(item.kind, item.name): item for item in sources}
    clashes = {
        item.key
        for item in items
        if (old := have.get((item.kind, item.name))) and old.content != item.content
    }
    if clashes:
        others = " and ".join(sorted({str(source.path) for source, _ in sources.values()}))
        raise ZooError(
            f"zoo {zoo.path}: it has other models of the same names than {others}: {_named(clashes)}"
        )
    rows = {("entry", row["name"]): row for row in snapshot.rows((*ENTRY_COLUMNS, *MEANS_COLUMNS))}
    rows |= {("model", row["name"]): row for row in snapshot.models()}
    new = {}
    for item in items:
        if (item.kind, item.name) in have:
            continue
        # Names of files are each zoo's own.
        name = file_name(item.name)
        row = {**rows[item.kind, item.name], "file": name if item.kind == "entry" else f"shared/{name}"}
        row.pop("zoo_fingerprint", None)
        if item.kind == "entry":
            index.insert(row, {}, replacing=None)
        else:
            index.put_model(row, {})
        new[Item(item.kind, item.name, row["file"], item.content)] = (zoo, item)
    index.record(snapshot.meta())
    index.record_facts({**snapshot.facts(), **index.facts()})
    return new


# ---- into a zoo


def _stage(
    zoo: Zoo,
    staged: Layout,
    items: Sequence[Item],
    fill: Callable[[Item, Path], None],
    progress: Progress | None,
) -> None:
    """Bring all that the zoo does not have into the folder of what comes in; its models stay as they are."""
    own = _files(zoo)
    for item in _told(items, progress):
        path = item.path(zoo._layout)
        if _is_sound(path, item.content):
            continue
        if own.get(path, item.content.sha256) != item.content.sha256:
            raise ZooError(f"zoo {zoo.path}: {item}: its file {path} is that of another model here")
        _bring(item.path(staged), item.content, functools.partial(fill, item))


def _bring(path: Path, content: Content, fill: Callable[[Path], None]) -> None:
    """Have a file whole, or not at all; ``fill`` writes a draft of it, and checks that."""
    if _is_sound(path, content):
        return
    # A link would be followed.
    remove_file(path)
    try:
        write_together({path: fill})
    except OSError as error:
        raise ZooError(f"{path}: could not be written ({error})") from error


def _install(zoo: Zoo, staged: Layout, index: Index, items: Sequence[Item]) -> None:
    """Put what came in into its place, and then, in one transaction, the index."""
    layout, old = zoo._layout, _files(zoo)
    try:
        for folder in (layout.entries, layout.shared):
            folder.mkdir(exist_ok=True)
        for item in items:
            if is_regular(new := item.path(staged)):
                os.replace(new, item.path(layout))
        for folder in (layout.entries, layout.shared, layout.root):
            sync_names(folder)
    except OSError as error:
        raise ZooError(f"zoo {zoo.path}: it cannot be written ({error})") from error
    zoo._index.restore(index)
    for path in old.keys() - {item.path(layout) for item in items}:
        remove_file(path)


def _files(zoo: Zoo) -> dict[Path, str]:
    """The files that the index names, and their SHA-256."""
    found = {}
    for of, rows in (
        (zoo._layout.of_entry, zoo._index.rows(FILE_COLUMNS)),
        (zoo._layout.of_model, zoo._index.models()),
    ):
        for row in rows:
            with contextlib.suppress(BadFile):
                found[of(row)] = str(row["sha256"])
    return found


def _is_sound(path: Path, content: Content) -> bool:
    try:
        check_size(path, content.bytes)
        check_sound(path, content.sha256)
    except BadFile:
        return False
    return True


def _content(data: bytes) -> Content:
    return Content(hashlib.sha256(data).hexdigest(), len(data))


def _told(items: Sequence[Item], progress: Progress | None) -> Iterator[Item]:
    tell = progress or (lambda what, done, total: None)
    for done, item in enumerate(items):
        tell("files", done, len(items))
        yield item
    tell("files", len(items), len(items))


def _named(keys: Iterable[Key]) -> str:
    names = [f"{kind} {name!r}" for kind, name, _ in sorted(keys)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# ---- what of a URL a zoo had


class Origin(NamedTuple):
    """What a zoo and a URL have had of each other.

    ``had``: models that the zoo had when it was last pushed or pulled: who finds them there and not here removed them.
    ``pulled``: models that came from there, and may go when they go there.
    """

    had: frozenset[Key] = frozenset()
    pulled: frozenset[Key] = frozenset()


def _origin(layout: Layout, url: str) -> Origin | None:
    return _origins(layout).get(url)


def _origins(layout: Layout) -> dict[str, Origin]:
    try:
        _, data = read_regular(layout.root / ORIGINS)
        return {
            str(url): Origin(*(frozenset(map(_key, origin[field])) for field in Origin._fields))
            for url, origin in json.loads(data).items()
        }
    # Then none is known, and nothing is taken away.
    except (BadFile, LookupError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _key(values: Sequence[Any]) -> Key:
    kind, name, sha256 = map(str, values)
    return kind, name, sha256


def _remember(layout: Layout, url: str, origin: Origin) -> None:
    path = layout.root / ORIGINS
    if not is_regular(path):
        # A link would be followed.
        remove_file(path)
    known = {**_origins(layout), url: origin}
    plain = {url: {field: sorted(keys) for field, keys in of._asdict().items()} for url, of in known.items()}
    # A zoo that may only be read can be pushed all the same.
    with contextlib.suppress(OSError):
        write_atomic(path, json.dumps(plain).encode())
