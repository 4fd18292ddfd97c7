"""Rows -> prompts and completions: readers, chat template, images, keyed draws, the `shapes` task, its model.

A dataset is a .jsonl (one object a line), a .json (a list of objects) or a .parquet file, a folder of such
shards, or a hub id; `name:test` takes the shards named after that split (`find_files`). A .json that holds
MMPR's {name: {root, annotation, repeat_time}} stands for those JSONL files. Columns, the first present of:

    prompt    prompt | problem | query | question           a string, or messages [{"role", "content"}, ...]
                                                            whose content is a string, or a list of blocks
                                                            {"type": "text" | "image"}
    images    images | decoded_image | image | image_path   paths under --image_root, or what parquet holds,
              | file_name | image_1, image_2, ...           {"bytes", "path"}, data URIs or base64; or in
                                                            the image blocks; none in a text-only row
    solution  solution | answer | answer_gt | ground_truth  what `accuracy` compares with; a list: any of them
              | reward_model["ground_truth"]                (verl)
    system    system | system_prompt | system_message       the system turn; else --system_prompt is
    chosen    chosen | completion | response                train_dpo.py: strings, one assistant message, or
    rejected  rejected | rejected_response                  conversations that begin alike: the prompt
    conversations | messages | message                      [{"from", "value"}, ...] (LLaVA, ShareGPT) or
                                                            [{"role", "content"}, ...]: the prompt; its last
                                                            answer (alone) is chosen and solution, if missing

`--columns solution=label` says which column it is. Where rewards use the solution, a row with two of its
columns that differ is an error, and so is a file whose rows have it in different columns. A column of images
or videos that nothing reads is an error in a row without images, else a warning.

An image stands where `<image>` (in strings) or an image block (in messages) is, else before the first user
text; any other number of placeholders is an error. If the prompt's last message is the assistant's, the
answer continues it, and the answer alone is scored (Step-DPO: the message holds the right steps, chosen and
rejected the next one). Some losses need columns of numbers (losses.PairLoss). Reward functions get every
other column unchanged; from parquet only the columns that the run uses are read (`rows_of_run`).
"""

import base64
import ctypes
import functools
import hashlib
import json
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import distributions
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from model import InputError, Policy, Prompt, all_gather_object, loading, on_rank_0, warn, without_video
from rewards.answers import final_answer, plain

SUFFIXES = (".parquet", ".jsonl", ".json")
ALIASES = {
    "prompt": ("prompt", "problem", "query", "question"),
    "images": ("images", "decoded_image", "image", "image_path", "file_name"),
    "solution": ("solution", "answer", "answer_gt", "ground_truth"),
    "chosen": ("chosen", "completion", "response"),
    "rejected": ("rejected", "rejected_response"),
    "system": ("system", "system_prompt", "system_message"),
}
TURNS_NAMES = ("conversations", "messages", "message")
EMPTY = (None, "", [])
# A column that may hold images, videos or sound, by its name; and a value that does.
MEDIA_NAME = re.compile(r"(^|_)(image|img|picture|photo|video|audio)s?"
                        r"(_?(\d+|path|file|file_?name|url|uri|byte|base64|b64|data)s?)?$", re.IGNORECASE)
MEDIA_FILE = re.compile(r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mkv|webm|mov|wav|mp3|flac)"
                        r"|(https?|file)://\S+|data:(image|video|audio)/.*", re.IGNORECASE | re.DOTALL)
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
TURNS = dict(enumerate([  # by EXIF's orientation
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90], 2))
TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # all else: image tensors
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what Pillow may decode: no PSD, EPS, FITS, ...
MAX_IMAGE_PIXELS = 89_478_485  # checked before decoding; above this Pillow warns of decompression bombs
LARGE_IMAGE = 16_000_000  # pixels; Pillow takes 4 to 20 bytes for each, so larger ones are decoded in turn
LARGE_IMAGE_LOCK = threading.Lock()


class RowError(InputError):
    """A row that cannot be used; the message starts with its place (file:line)."""


# ------------------------------------------------------------------------------------------------------------
# Reading


def find_files(name: str, split: str, flag: str = "--dataset") -> list[Path]:
    """The files of a dataset: itself, or the shards in a folder or hub dataset (fetched into its cache) whose
    path names the split, "data/train-00000-of-00002.parquet"; all of them if none names any split."""
    path, given = Path(name), None
    if not path.exists() and ":" in name:
        name, _, given = name.rpartition(":")
        path = Path(name)
    if path.is_file() and path.suffix in SUFFIXES:
        if given is not None:
            raise RowError(f"{flag} {name}:{given}: {name} is a file, which has no splits")
        return [path]
    if not path.exists() and path.suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        try:
            wanted = ["*" + suffix for suffix in SUFFIXES]
            path = Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
        except Exception as error:  # of many kinds: no network, no such dataset, no right to it
            raise RowError(f"{flag} {name}: no such file or folder, and the hub cannot give a dataset of "
                           f"that name: {type(error).__name__}: {error}") from None
    if not path.is_dir():
        raise RowError(f"{flag} {name}: {'' if path.exists() else 'no such file: '}expected a .jsonl, .json "
                       "or .parquet file, a folder of such files, or a hub id")

    found = [(f, f.relative_to(path).as_posix().lower()) for f in sorted(path.rglob("*")) if f.is_file()]
    kind = next((suffix for suffix in SUFFIXES if any(f.suffix == suffix for f, _ in found)), None)
    found = [(f, text) for f, text in found if f.suffix == kind]  # next to shards, a .json is metadata

    def named(split):
        return [f for f, text in found if re.search(rf"(^|[^a-z0-9])({split})([^a-z0-9]|$)", text)]

    files, some = named(re.escape((given or split).lower())), ", ".join(text for _, text in found[:20])
    if not files and given is None and not named("train|test|val|validation|dev"):
        files = [f for f, _ in found]
    if not files or len({f.parent for f in files}) > 1:
        raise RowError(f"{flag} {name}: {len(files)} files named after {given or split!r}, expected some, "
                       f"in one folder; say {name}:SPLIT or {name}:FOLDER/SPLIT, of: {some or 'no files'}")
    return files


def _parse(content: bytes, where: str):
    """JSON that is exactly what it says: no NaN, no name twice in an object, no half of a surrogate pair."""
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    def distinct(pairs):  # json would keep the last of two equal names without a word
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a column stands twice among {', '.join(name for name, _ in pairs)}")
        return dict(pairs)

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"{where}: not UTF-8: {error}") from None
    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=distinct)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # half an emoji: no tokenizer, no path takes it
        return value
    except (ValueError, RecursionError) as error:
        hint = " (one object a line is a .jsonl file)" if "Extra data" in str(error) else ""
        raise RowError(f"{where}: not valid JSON: {error}{hint}") from None


class JsonLines:
    """A .jsonl file, of which only the places of its lines are kept. Item: ("file:line", object)."""

    def __init__(self, path: Path):
        self.path, ends = path, [[-1]]
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + file.tell() - len(block))
            ends = np.concatenate([*ends, [file.tell()]])
            lengths = np.diff(ends) - 1
            for i in np.flatnonzero((0 < lengths) & (lengths < 9)):  # perhaps blank: spaces or a CR
                file.seek(ends[i] + 1)
                lengths[i] *= bool(file.read(lengths[i]).strip())
        self.number = np.flatnonzero(lengths)
        self.start, self.end = ends[self.number] + 1, ends[self.number + 1]

    def __len__(self):
        return len(self.number)

    def __getitem__(self, i):
        where = f"{self.path}:{self.number[i] + 1}"
        with open(self.path, "rb") as file:
            file.seek(self.start[i])
            return where, _parse(file.read(self.end[i] - self.start[i]), where)


class Parquet:
    """A parquet file, of which these columns are read (None: all). Item: ("file[row]", object).

    A row is cut out of its row group. All files together keep the groups that were read last, as many as fit
    into KEPT_BYTES, and always the last one."""

    KEPT_BYTES = 128 << 20
    kept, lock = OrderedDict(), threading.Lock()  # {(file, number of the group): table}, the latest last

    def __init__(self, path: Path, columns: set[str] | None = None):
        self.path = path
        about, self.names = self.read(lambda file: (file.metadata, file.schema_arrow.names))
        self.columns = None if columns is None else [name for name in self.names if name in columns]
        if columns is not None and not {*ALIASES["images"]}.intersection(self.names):
            kinds = self.read(lambda file: [str(kind) for kind in file.schema_arrow.types])
            self.columns += [name for name, kind in zip(self.names, kinds) if name not in columns
                             and (MEDIA_NAME.search(name) or "bytes: " in kind)]  # read, to be reported
        self.start = np.cumsum([0, *(about.row_group(g).num_rows for g in range(about.num_row_groups))])

    def read(self, what):
        try:
            from pyarrow.parquet import ParquetFile

            with ParquetFile(self.path) as file:
                return what(file)
        except ImportError:
            raise RowError(f"{self.path}: parquet takes pyarrow: pip install pyarrow") from None
        except (OSError, ValueError) as error:  # pyarrow's own are among them
            raise RowError(f"{self.path}: not a whole parquet file: {error}") from None

    def __len__(self):
        return int(self.start[-1])

    def __getitem__(self, i):
        group = int(np.searchsorted(self.start, i, side="right")) - 1
        with self.lock:  # of the loader's threads
            table = self.kept.pop((self, group), None)
            if table is None:
                table = self.read(lambda file: file.read_row_group(group, columns=self.columns))
            while self.kept and table.nbytes + sum(t.nbytes for t in self.kept.values()) > self.KEPT_BYTES:
                self.kept.popitem(last=False)
            self.kept[self, group] = table
        try:
            return f"{self.path}[{i}]", table.slice(i - self.start[group], 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise RowError(f"{self.path}[{i}]: not UTF-8: {error}") from None


class Rows(Sequence):
    """The rows of some files, each read when it is asked for, with its columns under their canonical names.

    parts: (JsonLines | Parquet | list, folder of its images under the root) of each file; shares: how often
    draws take from each (`Plan`), None: every row once an epoch. A slice is such a view, too. seen: what
    `report` tells of all rows that were read. golds: solutions are used, so `check_gold` looks at them.
    """

    def __init__(self, parts, image_root, need, shares=None, renamed=None, system=None):
        self.parts, self.image_root, self.need, self.shares = parts, image_root, need, shares
        self.renamed, self.system, self.seen, self.golds = renamed or {}, system, {}, False
        self.sizes = [len(part) for part, _ in parts]
        self.ends = np.cumsum(self.sizes)
        self.index = range(int(self.ends[-1]))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        if isinstance(i, slice):
            view = Rows(self.parts, self.image_root, self.need, None, self.renamed, self.system)
            view.index, view.seen, view.golds = self.index[i], self.seen, self.golds
            return view
        at = self.index[i]
        p = int(np.searchsorted(self.ends, at, side="right"))
        part, folder = self.parts[p]
        source, value = part[at - int(self.ends[p]) + self.sizes[p]]
        row = canonical(value, source, self.image_root, folder, self.renamed, self.system)
        for name in self.need:
            if row.get(name) in EMPTY:
                has = getattr(part, "names", value)  # a parquet file has columns that were not read
                wanted = (self.renamed[name],) if name in self.renamed else ALIASES.get(name, (name,))
                raise RowError(f"{source}: no {' or '.join(wanted)} column, or an empty one; it has "
                               f"{', '.join(has)}")
        if self.golds:
            check_gold(row)
        file = re.sub(r":\d+$|\[\d+\]$", "", source)
        self.seen.setdefault(("images", bool(row["images"])), source)
        for column in set(self.renamed.values()).intersection(value):
            self.seen.setdefault(("named", column), source)
        for column, gold in islice(row["_golds"].items(), 1):
            self.seen.setdefault(("gold", file, column), (at, source, f"{gold!r:.100}"))
        for column in row["_unread"]:
            self.seen.setdefault(("unread", column), source)
        return row


def read_rows(names, image_root: str | None, need: tuple[str, ...], split="train", weights=None,
              flag="--dataset", columns: set[str] | None = None, renamed=None, system=None) -> Rows:
    """The rows of the named datasets, in order (`find_files`); JSONL and parquet are not held in memory.

    A row is checked for `need` when it is read; images are opened by load_image. weights: one a dataset, its
    share of the draws; MMPR's repeat_time weighs its files in the same way. columns: the only ones that are
    read from parquet, None: all. renamed: {our name of a column: the data's}; system: the system turn of rows
    that have none.
    """
    parts, shares = [], []
    names = [names] if isinstance(names, str) else names
    for name, weight in zip(names, weights or [None] * len(names), strict=True):
        new, times = [], []
        for file in find_files(name, split, flag):
            for part, folder, repeat in open_file(file, columns):
                if not len(part):
                    raise RowError(f"{file}: no rows")
                new.append((part, folder))
                times.append(len(part) * repeat)
        parts += new
        shares += times if weight is None else [weight * n / sum(times) for n in times]
    uneven = weights is not None or shares != [len(part) for part, _ in parts]
    return Rows(parts, image_root, need, shares if uneven else None, renamed, system)


def rows_of_run(args, need: tuple[str, ...], columns: set[str] | None = None):
    """(training rows, held-out rows) that the flags name; without --dataset those of the built-in task.
    columns: those that the run uses beside the ones that this file knows by name; None: every column."""
    renamed = dict(pair.split("=", 1) for pair in args.columns or ())
    golds = "solution" in need or columns is None or "solution" in columns
    if columns is not None:
        known = {*TURNS_NAMES, "reward_model", "history"}.union(*ALIASES.values(), renamed.values())
        columns = columns | known | {*need, args.sort_by}
    read = functools.partial(read_rows, image_root=args.image_root, need=need, columns=columns,
                             renamed=renamed, system=args.system_prompt)
    if args.dataset is None:
        train, held_out = shapes_rows(4096, args.seed, "train"), shapes_rows(256, args.seed, "test")
        for row in (*train, *held_out):
            row["_system"] = args.system_prompt
    else:
        train, held_out = read(args.dataset, weights=args.dataset_weights), []
    if args.eval_dataset is not None:
        held_out = read(args.eval_dataset, split="test", flag="--eval_dataset")
    for rows in (train, held_out):
        if isinstance(rows, Rows):
            rows.golds = golds
    return train, held_out


def open_file(file: Path, columns: set[str] | None = None):
    """[(rows, folder of their images under --image_root, the weight of its draws), ...]: several for
    MMPR's meta.json, whose annotation files lie in or beside its folder."""
    if file.suffix == ".jsonl":
        return [(JsonLines(file), "", 1)]
    if file.suffix == ".parquet":
        return [(Parquet(file, columns), "", 1)]
    content = _parse(file.read_bytes(), str(file))
    if isinstance(content, list):
        return [([(f"{file}[{i}]", value) for i, value in enumerate(content)], "", 1)]
    parts = []
    for name, entry in content.items() if isinstance(content, dict) else [("", None)]:
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise RowError(f"{file}: expected a list of objects, or MMPR's {{name: {{root, annotation}}}}")
        beside = [base / entry["annotation"] for base in (file.parent, file.parent.parent)]
        found = next((path for path in beside if path.is_file() and path.suffix == ".jsonl"
                      and path.resolve().is_relative_to(file.parent.parent.resolve())), None)
        if found is None:
            raise RowError(f"{file}: {name}: no annotation {entry['annotation']} in its folder or beside it")
        repeat = entry.get("repeat_time", 1)
        if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 < repeat < math.inf:
            raise RowError(f"{file}: {name}: repeat_time must be a number above 0, got {repeat!r}")
        parts.append((JsonLines(found), str(entry.get("root", "")), repeat))
    return parts


def canonical(value, source: str, image_root: str | None, folder: str, renamed=None, system=None) -> dict:
    """A row as the rest of the program takes it: ALIASES, `images` a list, and what starts with _:

    _source, _image_root; _system: the text of its system turn; _golds: {column: its solution there}, of which
    the first counts; _unread: columns with images or videos that nothing reads."""
    if not isinstance(value, dict):
        raise RowError(f"{source}: expected an object, got {type(value).__name__}")
    row = value | {"_source": source, "_image_root": image_root}  # ours win: a row cannot move its root
    renamed, used = renamed or {}, set()
    names = {name: (renamed[name],) if name in renamed else aliases for name, aliases in ALIASES.items()}
    for name, aliases in names.items():
        found = next((a for a in aliases if value.get(a) not in EMPTY), None)
        if found is not None:  # under both names: a reward function may ask for the dataset's own
            row[name] = value[found]
            used.add(found)
        elif name in renamed:
            row.pop(name, None)

    row["_golds"] = {a: value[a] for a in names["solution"] if value.get(a) not in EMPTY}
    verl = value.get("reward_model")
    if "solution" not in renamed and isinstance(verl, dict) and verl.get("ground_truth") not in EMPTY:
        row["_golds"]["reward_model"] = verl["ground_truth"]
        row.setdefault("solution", verl["ground_truth"])
    if value.get("history") not in EMPTY:
        raise RowError(f"{source}: nothing reads the column history; write its turns into messages")
    row |= _from_conversations(row, source)
    turns = next((name for name in TURNS_NAMES if value.get(name)), None)
    if row.get("prompt") is None and turns:
        row |= _from_turns(value[turns], row, source)
        if row.get("solution") is not None and not row["_golds"]:
            row["_golds"] = {turns: row["solution"]}

    row["_system"] = system if row.get("system") in EMPTY else row["system"]
    if not isinstance(row["_system"], str | None):
        raise RowError(f"{source}: the system turn must be a string, got {type(row['_system']).__name__}")

    images = row.get("images")
    images = [] if images is None else images if isinstance(images, list) else [images]
    in_blocks, row["prompt"] = images_of_blocks(row.get("prompt"))
    if None in in_blocks and any(x is not None for x in in_blocks) or images and any(in_blocks) \
            and in_blocks != images:
        raise RowError(f"{source}: the image blocks of its messages and its images do not say the same")
    if any(in_blocks):  # what the blocks held stands in the row once
        images = in_blocks
        row |= {name: images_of_blocks(value[name])[1] for name in TURNS_NAMES if name in value}
    if not images and "images" not in renamed:
        numbered = {name for name in value if re.fullmatch(r"image_\d+", name) and value[name] not in EMPTY}
        images = [value.get(f"image_{i}") for i in range(1, len(numbered) + 1)]
        used |= numbered
    images = [os.path.join(folder, x) if folder and isinstance(x, str) else x for x in images]
    row["images"], row["prompt"] = in_numbered_places(images, row.get("prompt"))
    row["_unread"] = [name for name in value if name not in used and holds_media(name, value[name])]
    if row["_unread"] and not images and "images" not in renamed:
        name = row["_unread"][0]
        raise RowError(f"{source}: nothing reads the column {name}, which holds images, video or sound: "
                       f"--columns images={name} reads it as images (of text alone: --columns images=images)")
    for name in value.keys() - {"images"}:
        if not isinstance(value[name], str | list) and (name in ALIASES["images"] or name in row["_unread"]):
            row.pop(name)  # pixels stand in the row once
    return row


def images_of_blocks(prompt):
    """(what each image block of the messages holds, None where nothing; the messages without that)."""
    if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
        return [], prompt
    images, messages = [], []
    for message in prompt:
        blocks = message.get("content")
        if isinstance(blocks, list):
            kinds = [block.get("type") if isinstance(block, dict) else None for block in blocks]
            for block, kind in zip(blocks, kinds):
                if kind in ("image", "image_url"):
                    names = ("image", "image_url", "path", "url")
                    images.append(next((block[k] for k in names if block.get(k) is not None), None))
            blocks = [{"type": "image"} if kind in ("image", "image_url") else block
                      for block, kind in zip(blocks, kinds)]
            message = message | {"content": blocks}
        messages.append(message)
    return images, messages


# A data URI, or bare base64 of PNG, JPEG, GIF, WEBP or BMP, by how their first bytes read.
ENCODED_IMAGE = r"data:image/[\w.+-]+;base64,|(?=(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk)[A-Za-z0-9+/]{60})"


def holds_media(name: str, value) -> bool:
    """Whether a column holds images, video or sound, or names files of such."""
    if isinstance(value, list):
        return any(holds_media(name, x) for x in value)
    if isinstance(value, dict):
        return bool(value.keys() & {"bytes", "path"}) and any(x not in EMPTY for x in value.values())
    if isinstance(value, bytes):
        return MEDIA_NAME.search(name) is not None
    return isinstance(value, str) and MEDIA_FILE.fullmatch(value.strip()) is not None


def in_numbered_places(images: list, prompt):
    """(images, prompt), where <image 1> or <image1> in a prompt's text become `<image>`, if the numbers are
    those of the images (MMMU, MathVision)."""
    numbers = [int(n) for n in re.findall(r"<image ?(\d+)>", prompt)] if isinstance(prompt, str) else []
    if not numbers or sorted(numbers) != list(range(1, len(images) + 1)):
        return images, prompt
    return [images[n - 1] for n in numbers], re.sub(r"<image ?\d+>", "<image>", prompt)


def text_of(content):
    """A message's content: the text of a list of text blocks; else as it is."""
    if content and isinstance(content, list) and all(
            isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)
            for block in content):
        return "".join(block["text"] for block in content)
    return content


def _from_turns(turns, row: dict, source: str) -> dict:
    """The prompt, and what the turns say of chosen, rejected and solution."""
    def content(turn):
        return turn["value"] if "value" in turn else turn["content"]

    try:
        messages = [{"role": ROLES.get(role, role), "content": content(turn)} for turn in turns
                    for role in [turn["from"] if "from" in turn else turn["role"]]]
        new = {name: content(row[name]) for name in ("chosen", "rejected") if isinstance(row.get(name), dict)}
    except (TypeError, KeyError):
        raise RowError(f"{source}: expected turns of {{'from', 'value'}}, got {str(turns)[:80]}") from None
    if messages[-1]["role"] == "assistant" and row.get("chosen") is None:
        new["chosen"] = text_of(messages.pop()["content"])
        if row.get("solution") is None:
            new["solution"] = new["chosen"]
    return new | {"prompt": messages}


def _from_conversations(row: dict, source: str) -> dict:
    """Where chosen and rejected are whole conversations, what both begin with is the prompt (as in TRL)."""
    whole = {name: row[name] for name in ("chosen", "rejected") if isinstance(row.get(name), list)
             and len(row[name]) > 1 and all(isinstance(m, dict) for m in row[name])}
    if not whole:
        return {}
    begun, *others = [turns[:-1] for turns in whole.values()]
    prompt = row.get("prompt", begun)
    bare = [text_of(turn.get("content")) for turn in begun]
    if any(turns != begun for turns in others) or prompt != begun and [prompt] != bare:
        raise RowError(f"{source}: chosen, rejected and prompt are conversations that begin differently: "
                       "only their last turn may differ")
    return {"prompt": prompt} | {name: turns[-1:] for name, turns in whole.items()}


def check_gold(row: dict):
    """RowError for a row that has its solution in two columns which differ."""
    (first, gold), *others = row.get("_golds", {"": None}).items() or [("", None)]
    for name, other in others:
        if plain(final_answer(str(gold))) != plain(final_answer(str(other))):
            raise RowError(f"{row['_source']}: the columns {first} and {name} both hold a solution, and "
                           f"differ ({gold!r:.60} and {other!r:.60}); --columns solution={name} takes one")


def report(rows, rank: int, sees=False):
    """What all ranks have seen in the rows: a file that has its solutions, if they are used, in different
    columns is an error; rank 0 prints where they are, which columns with images nothing reads, and whether a
    model that `sees` got no image. -> what they have seen. All ranks must call this."""
    seen = {}
    for part in all_gather_object(getattr(rows, "seen", {})):
        seen = part | seen
    found, examples = {}, {}  # {file: {column: (place, source, gold)}}, {column: one of them}
    for (kind, *key), what in seen.items():
        if kind == "gold" and rows.golds:
            found.setdefault(key[0], {})[key[1]] = examples[key[1]] = what
    errors = []
    for file, columns in found.items():
        (_, one, _), (_, other, _) = (sorted(columns.values()) * 2)[:2]
        if len(columns) > 1:
            errors.append(f"{file}: the solution is in the column {' or '.join(columns)} ({one} and {other} "
                          "differ in that); --columns solution=NAME says which column it is")
    refuse(errors)
    if rank == 0:
        for column, (_, source, gold) in examples.items():
            print(f"data: solutions are from the column {column}, as in {source}: {gold}", flush=True)
        for column in sorted(key[0] for kind, *key in seen if kind == "unread"):
            warn(f"{seen['unread', column]}: nothing reads the column {column}: the images are in another")
        if sees and ("images", False) in seen and ("images", True) not in seen:
            warn("no row has an image, and this is a model that sees (--columns images=NAME)")
    return seen


def try_rows(rows):
    """(row, None), or (None, what is wrong with it) of each, in order."""
    for i in range(len(rows)):
        try:
            found = rows[i], None
        except RowError as error:
            found = None, str(error)
        yield found


def readable(rows):
    """The rows that can be read, in order; `check_rows` and `check_eval_rows` report the others."""
    return (row for row, error in try_rows(rows) if error is None)


def refuse(errors: list[str]):
    """One RowError for all these messages, if there are any: the first twenty, and the number of the rest."""
    if len(errors) == 1:
        raise RowError(errors[0])
    if errors:
        more = [f"and {len(errors) - 20} more"] if len(errors) > 20 else []
        raise RowError("\n  ".join([f"{len(errors)} rows cannot be used:", *errors[:20], *more]))


def check_numbers(rows, name: str, low: float, high: float, why: str):
    """RowError unless row[name] is a number from low to high in every row. why: the flag that takes it."""
    errors = []
    for row, error in try_rows(rows):
        value = None if error else row.get(name)
        if error:
            errors.append(error)
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            errors.append(f"{row['_source']}: {why} takes a number from {low:g} to {high:g} from the column "
                          f"{name}, got {str(value)[:80]!r}")
    refuse(errors)


def load_image(image, row: dict) -> Image.Image:
    """A row's image -> RGB as it is shown: turned as its EXIF says, what is transparent over white, 16 bits
    as 8, the first frame."""
    found, source = find_image(image, row), row["_source"]
    if isinstance(found, Image.Image):
        return found.convert("RGB")
    if isinstance(found, bytes):
        return decode_image(BytesIO(found), source, f"of {len(found)} bytes")
    return decode_image(found, source, found)


def find_image(image, row: dict) -> Image.Image | bytes | str:
    """What a row names as its image: a PIL image, the bytes of {"bytes", "path"}, or a file's real path under
    the row's image root. Refuses URLs, paths and links out of the root, and what is no regular file."""
    source = row["_source"]
    if isinstance(image, dict):  # datasets, image blocks, OpenAI's image_url
        image = next((image[k] for k in ("bytes", "path", "image", "url") if image.get(k) is not None), image)
    if isinstance(image, str) and (coded := re.match(ENCODED_IMAGE, image)):
        try:
            image = base64.b64decode(image[coded.end():], validate=True)
        except ValueError as error:
            raise RowError(f"{source}: an image of {len(image)} characters is no base64: {error}") from None
    if isinstance(image, (Image.Image, bytes)):
        return image
    if not isinstance(image, str):
        raise RowError(f"{source}: an image must be a path or {{bytes, path}}, got {type(image).__name__}")
    if len(image) > 4096:
        raise RowError(f"{source}: an image of {len(image)} characters is no path and no base64 of an image")
    image = image.removeprefix("file://")
    if "://" in image or image.startswith("data:"):
        raise RowError(f"{source}: {image[:80]}: URLs are not fetched; download the image and give its path")
    if row["_image_root"] is None:
        raise RowError(f"{source}: the row names an image ({image}), but --image_root is not given")
    root = os.path.realpath(row["_image_root"])
    named = os.path.normpath(os.path.join(root, image.replace("\0", "?")))
    path = os.path.realpath(named)
    if os.path.commonpath([root, path]) != root:
        leads = "" if os.path.commonpath([root, named]) != root else f": it is a link to {path}"
        raise RowError(f"{source}: image {image} lies outside --image_root {row['_image_root']}{leads}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise RowError(f"{source}: image {image} is not a regular file but a folder, a pipe or a device")
    return path


def image_digest(image, row: dict) -> str:
    """sha256 of an image's content, not decoded. A file is read whole, since a changed one may keep its size
    and time; reading takes a hundredth of the time of decoding."""
    found = find_image(image, row)
    if isinstance(found, Image.Image):
        found = f"{found.mode} {found.size} ".encode() + found.tobytes()
    elif isinstance(found, str):
        with open(found, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(found).hexdigest()


def decode_image(file, source: str, name: str) -> Image.Image:
    """Pillow, limited in the formats that it may read, in a picture's pixels, and in the memory that threads
    take at once."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as opened:
            pixels = opened.width * opened.height
            if pixels > MAX_IMAGE_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are more than {MAX_IMAGE_PIXELS}, "
                                 "the most that are decoded; make it smaller")
            with LARGE_IMAGE_LOCK if pixels > LARGE_IMAGE else nullcontext():
                return to_rgb(opened)
    except FileNotFoundError:
        raise RowError(f"{source}: image {name} does not exist") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:  # corrupt
        raise RowError(f"{source}: image {name} cannot be read: {error}") from None


def to_rgb(opened: Image.Image) -> Image.Image:
    shown = opened.getexif().get(0x0112)  # not exif_transpose: it writes all tags anew, odd ones fail
    shown = opened.transpose(TURNS[shown]) if shown in TURNS else opened
    if shown.mode == "I;16":  # convert() would clip it to white
        shown = shown.point(lambda value: value / 256).convert("L")
    if not shown.has_transparency_data:
        return shown.convert("RGB")
    white = Image.new("RGB", shown.size, "white")  # convert() would show the colour beneath, mostly black
    shown = shown.convert("RGBA") if shown.mode != "RGBA" else shown
    white.paste(shown, mask=shown)  # the same values as alpha_composite, in half of the memory
    return white


def to_messages(row: dict) -> list[dict]:
    """The row's prompt as chat messages whose content is a list of text and image blocks, images matched.

    >>> row = {"prompt": "a <image> b", "images": ["x.png"], "_source": "f:1"}
    >>> [block.get("text", "IMAGE") for block in to_messages(row)[0]["content"]]
    ['a ', 'IMAGE', ' b']
    """
    source, prompt, count = row["_source"], row["prompt"], len(row["images"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    system = row.get("_system")
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), (str, list)) for m in messages):
        raise RowError(f"{source}: prompt must be a string or a list of {{'role', 'content'}} messages")

    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    elif row.get("system") not in EMPTY and text_of(messages[0]["content"]) != system:
        raise RowError(f"{source}: its column system and its first turn are two system turns, and differ")

    out, placeholders = [], 0
    for message in messages:
        role, content, blocks = ROLES.get(message["role"], message["role"]), message["content"], []
        if role not in ("system", "user", "assistant"):  # many templates would print it as it is
            raise RowError(f"{source}: a turn has the role {role!r}; expected system, user (human) "
                           "or assistant (gpt)")
        for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "image":  # struct columns carry a null text beside each image: leave it behind
                blocks.append({"type": "image"})
            elif kind == "text" and isinstance(block.get("text"), str):
                for i, text in enumerate(block["text"].split("<image>")):
                    blocks += [{"type": "image"}] if i else []
                    blocks += [{"type": "text", "text": text}] if text else []
            else:
                raise RowError(f"{source}: expected an image block or a text block, got {str(block)[:80]}")
        placeholders += sum(block["type"] == "image" for block in blocks)
        out.append({"role": role, "content": blocks})

    if placeholders == 0 and count:
        first_user = next((m for m in out if m["role"] == "user"), None)
        if first_user is None:
            raise RowError(f"{source}: images, but no user message that they could stand in")
        first_user["content"] = [{"type": "image"} for _ in range(count)] + first_user["content"]
    elif placeholders != count:
        raise RowError(f"{source}: the prompt has {placeholders} image placeholders, "
                       f"the row has {count} images")
    return out


# ------------------------------------------------------------------------------------------------------------
# Encoding


def as_ids(ids: list[int]) -> torch.Tensor:
    """(len,) int64. By numpy, which reads a list five times as fast as torch.tensor does."""
    return torch.from_numpy(np.array(ids, dtype=np.int64))


def _special_tokens(tokenizer, text: str) -> dict:
    """A template that writes the BOS itself must not get a second one (transformers' own rule)."""
    return {"add_special_tokens": not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))}


def token_ids(tokenizer, text: str, **special) -> list[int]:
    """tokenizer(text)["input_ids"]. Where transformers' wrapper adds nothing, the tokenizers library is asked
    directly: the wrapper takes as long as a short text."""
    if type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus:
        library = tokenizer.backend_tokenizer
        if library.padding is library.truncation is None and not library.encode_special_tokens:
            return library.encode_batch_fast([text], **special)[0].ids
    return tokenizer(text, **special)["input_ids"]


def _render(processor, messages: list[dict], source: str, **kwargs) -> str:
    try:
        return processor.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:  # templates raise for roles they do not know, or turns that do not alternate
        raise RowError(f"{source}: the chat template refused it: {type(error).__name__}: {error}") from error


def _render_prompt(processor, messages: list[dict], source: str) -> str:
    """Up to where the answer begins: a new assistant turn, or the end of the one that the prompt began."""
    if messages[-1]["role"] != "assistant":
        return _render(processor, messages, source, add_generation_prompt=True)
    if not messages[-1]["content"] or "text" not in messages[-1]["content"][-1]:
        raise RowError(f"{source}: the prompt's last message is the assistant's, and does not end with text")
    return _render(processor, messages, source, continue_final_message=True)


@functools.lru_cache
def control_tokens(processor, template: str | None, ends: tuple[int, ...], placeholders: frozenset[int]):
    """(ids of the special tokens that begin or end a turn, all these and the placeholders', how those are
    written in a text). The last is None if one of them may come from other text than its own."""
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    ids = token_ids(processor.tokenizer, _render(processor, [message], ""), add_special_tokens=False)
    added = processor.tokenizer.added_tokens_decoder
    turns = {i for i in ids if i in added and added[i].special}.union(ends)
    control = turns | {i for i in placeholders if i < len(processor.tokenizer)}
    known = all(i in added and not added[i].normalized for i in control)
    return turns, control, [added[i].content for i in control] if known else None


def refuse_control_tokens(policy: Policy, processor, text: str, what: str):
    """RowError if text of a row spells a token that begins or ends a turn, or stands for an image: the model
    would read turns and images that the row does not have."""
    turns, control, spellings = control_tokens(processor, getattr(processor, "chat_template", None),
                                               tuple(policy.eos_ids), policy.never_sampled_ids)
    if spellings is not None and not any(spelling in text for spelling in spellings):
        return  # a search, since tokenizing takes longer
    found = control.intersection(token_ids(processor.tokenizer, text, add_special_tokens=False))
    if found:
        tokens = ", ".join(processor.tokenizer.convert_ids_to_tokens(sorted(found)))
        hint = ("If a chat template has rendered it already, give bare text, or messages." if found & turns
                else "An image's place in a prompt is written <image>.")
        raise RowError(f"{what} contains {tokens}; only the chat template and the processor write that. "
                       f"{hint}")


class Begun(NamedTuple):
    """What stands before a row's answer: the chat messages, the same rendered, and its ids, in which an image
    is still one placeholder."""

    messages: list[dict]
    text: str
    ids: list[int]


def begin_row(policy: Policy, processor, row: dict) -> Begun:
    """The row's prompt up to where the answer begins, by chat template and tokenizer alone."""
    messages = to_messages(row)
    text = _render_prompt(processor, messages, row["_source"])
    for block in (block for message in messages for block in message["content"] if block["type"] == "text"):
        refuse_control_tokens(policy, processor, block["text"], f"{row['_source']}: the prompt")
    ids = token_ids(processor.tokenizer, text, **_special_tokens(processor.tokenizer, text))
    return Begun(messages, text, ids)


@functools.lru_cache
def leaves_text_alone(processor) -> bool:
    """Whether all that the processor does to a prompt without images is to tokenize it. Tried on one prompt:
    its __call__ takes five times as long as the tokenizer."""
    message = {"role": "user", "content": [{"type": "text", "text": "How many shapes are there?\n 7"}]}
    text = _render_prompt(processor, [message], "")
    special = _special_tokens(processor.tokenizer, text)
    inputs = processor(text=[text], images=None, return_tensors="pt", **special)
    return (inputs["input_ids"].tolist() == [processor.tokenizer(text, **special)["input_ids"]]
            and inputs.keys() <= set(TEXT_KEYS)
            and not any(inputs[name].any() for name in TEXT_KEYS[2:] if name in inputs))


def tokenize_prompt(processor, row: dict, begun: Begun):
    """(ids (P,) with the images' placeholders, image tensors, further text tensors by name) of one row, in
    one processor call."""
    images, source = [load_image(image, row) for image in row["images"]], row["_source"]
    if not images and leaves_text_alone(processor):
        return as_ids(begun.ids), {}, {}
    try:
        inputs = processor(text=[begun.text], images=[images] if images else None, return_tensors="pt",
                           **_special_tokens(processor.tokenizer, begun.text))
    except Exception as error:  # e.g. an aspect ratio that the image processor refuses
        raise RowError(f"{source}: the processor refused it: {type(error).__name__}: {error}") from error
    pixels = {k: v for k, v in inputs.items() if k not in TEXT_KEYS}
    return inputs["input_ids"][0], pixels, {k: inputs[k] for k in TEXT_KEYS if k in inputs}


def encode_prompt(policy: Policy, processor, row: dict, begun: Begun | None = None) -> Prompt:
    """`tokenize_prompt`, and where the tokens stand."""
    tokens, pixels, text_inputs = tokenize_prompt(processor, row, begun or begin_row(policy, processor, row))
    positions = policy.prompt_positions(tokens, text_inputs, pixels)
    return Prompt(tokens, positions, pixels, row, policy.prompt_images(tokens))


def chat_request(row: dict) -> dict:
    """What encode_prompt encodes, for a server's own processor (rollout.VLLMServer): OpenAI chat messages,
    images as PNG in data URLs, and whether the answer begins a turn or continues the last."""
    messages, images = to_messages(row), iter([load_image(image, row) for image in row["images"]])
    for block in (b for m in messages for b in m["content"] if b["type"] == "image"):
        png = BytesIO()
        next(images).save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        block |= {"type": "image_url", "image_url": {"url": url}}
    begun = messages[-1]["role"] == "assistant"
    return {"messages": messages, "add_generation_prompt": not begun, "continue_final_message": begun}


def answer_text(row: dict, column: str) -> str:
    """row[column], a string or one assistant message of text."""
    answer = [row[column]] if isinstance(row[column], dict) else row[column]
    if (isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict)
            and answer[0].get("role", "assistant") == "assistant"):
        answer = text_of(answer[0].get("content"))
    if not isinstance(answer, str) or not answer.strip():
        raise RowError(f"{row['_source']}: {column} must be a non-empty string or one assistant message of "
                       f"text, got {str(answer)[:80]!r}")
    return answer


def encode_completion(policy: Policy, processor, row: dict, column: str,
                      begun: Begun | None = None) -> torch.Tensor:
    """The ids (len,) that the policy should have produced after the prompt to say row[column], EOS included.

    The conversation is rendered with and without the answer, and tokenized whole. If the prompt's ids begin
    the whole's, what follows them is the answer. Else a token would cross the boundary, where the sampler's
    prompt ends, and the answer is tokenized by itself. What the template writes after the first EOS is left
    out, since sampling stops there; a template that ends no turn gets the tokenizer's EOS.
    """
    source, answer, tokenizer = row["_source"], answer_text(row, column), processor.tokenizer
    messages, prompt, prompt_ids = begun or begin_row(policy, processor, row)
    refuse_control_tokens(policy, processor, answer, f"{source}: {column}")
    continued = messages[-1]["role"] == "assistant"
    messages, blocks = (messages[:-1], messages[-1]["content"]) if continued else (messages, [{"text": ""}])
    text = {"type": "text", "text": blocks[-1]["text"] + answer}
    whole = _render(processor, [*messages, {"role": "assistant", "content": [*blocks[:-1], text]}], source)
    rest = whole.removeprefix(prompt)
    if rest == whole or answer.strip() not in rest:
        raise RowError(f"{source}: the chat template does not render {column} whole after the prompt: "
                       f"{rest[:200]!r}")
    ids = token_ids(tokenizer, whole, **_special_tokens(tokenizer, prompt))
    ids = (ids[len(prompt_ids):] if ids[:len(prompt_ids)] == prompt_ids
           else token_ids(tokenizer, rest, add_special_tokens=False))
    end = min((ids.index(eos) for eos in policy.eos_ids if eos in ids), default=None)
    return as_ids([*ids, tokenizer.eos_token_id] if end is None else ids[:end + 1])


def encode_answers(policy: Policy, processor, row: dict, columns: tuple[str, ...]):
    """(what stands before the row's answers, [completion ids of each column])"""
    begun = begin_row(policy, processor, row)
    completions = [encode_completion(policy, processor, row, column, begun) for column in columns]
    if len(columns) == 2 and torch.equal(*completions):
        raise RowError(f"{row['_source']}: {columns[0]} and {columns[1]} are the same")
    return begun, completions


def encode_group(policy: Policy, processor, row: dict, columns: tuple[str, ...]):
    """(Prompt, [completion ids of each column]): one preference pair, or one SFT example."""
    begun, completions = encode_answers(policy, processor, row, columns)
    return encode_prompt(policy, processor, row, begun), completions


def in_order(function, items, workers: int, ahead: int | None = None):
    """function(item) of each item, one by one; `workers` threads compute `ahead` of them (None: two a thread)
    before they are asked for. 0 workers: each when it is asked for. An error is raised at its item's place.

    Threads are enough, since Pillow, numpy and the tokenizer release Python's lock while they work: no pixels
    are copied between processes, and none is left behind. Nothing is begun after the caller stops asking.
    """
    if not workers:
        yield from map(function, items)
        return
    items, pool = iter(items), ThreadPoolExecutor(workers)
    begun = deque(pool.submit(function, x) for x in islice(items, 2 * workers if ahead is None else ahead))
    try:
        while begun:
            begun.extend(pool.submit(function, x) for x in islice(items, 1))
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------
# The order of draws


class Plan(Sequence):
    """The row of every draw of a run, computed when it is asked for: a list of them would outgrow the rows.

    Each epoch is a permutation keyed by (seed, epoch), less the dropped rows. With keys, one a row, an epoch
    is sorted by them, lowest first; rows of equal keys stay permuted. With shares, sizes are those of several
    datasets, of which each draw takes the one furthest below its share, in that dataset's own order:

    >>> [int(i >= 10) for i in Plan([10, 2], 8, 0, shares=[3, 1])]
    [0, 0, 1, 0, 0, 0, 1, 0]

    A row depends on the arguments and the draw's number alone, so a run can continue anywhere, on any number
    of ranks. No batch is ragged: one that crosses an epoch's end goes on into the next epoch.
    """

    BLOCK = 4096  # draws of a mixture; how many are of each dataset is kept for the start of each block

    def __init__(self, sizes: list[int], num_draws: int, seed: int, dropped=frozenset(),
                 keys: list | None = None, shares: list[float] | None = None):
        self.num_draws, self.seed, self.keys = num_draws, seed, keys
        self.starts = np.cumsum([0, *(sizes if shares else [sum(sizes)])])
        self.dropped, self.orders = np.array(sorted(dropped), dtype=np.int64), {}
        self.kept = np.diff(self.starts - np.searchsorted(self.dropped, self.starts)).tolist()
        self.counts = [num_draws]  # of each dataset
        if shares:
            self._mix((np.array(shares) / sum(shares)).tolist())
        if any(count and not kept for count, kept in zip(self.counts, self.kept)):
            raise InputError("no row is left: every one of them is too long")

    def _mix(self, shares: list[float]):
        self.dataset, self.before, self.counts = np.empty(len(self), np.uint16), [], [0] * len(shares)
        for n in range(len(self)):
            if n % self.BLOCK == 0:
                self.before.append(list(self.counts))
            behind = [share * (n + 1) - count for share, count in zip(shares, self.counts)]
            j = behind.index(max(behind))
            self.dataset[n] = j
            self.counts[j] += 1

    def _order(self, j: int, epoch: int) -> np.ndarray:
        """The rows of an epoch of dataset j, in order; the latest epoch of each is kept."""
        known, order = self.orders.get(j, (None, None))
        if known != epoch:
            start, end = self.starts[j:j + 2].tolist()
            order = np.random.default_rng([self.seed + j, epoch]).permutation(end - start) + start
            if self.keys is not None:
                order = np.array(sorted(order.tolist(), key=self.keys.__getitem__))
            order = order[~np.isin(order, self.dropped)] if len(self.dropped) else order
            self.orders[j] = epoch, order
        return order

    def __len__(self):
        return self.num_draws

    def __getitem__(self, draw):
        if isinstance(draw, slice):
            return [self[i] for i in range(*draw.indices(len(self)))]
        if not 0 <= draw < len(self):
            raise IndexError(draw)
        j, n = 0, draw
        if len(self.kept) > 1:
            j, first = int(self.dataset[draw]), draw - draw % self.BLOCK
            n = self.before[draw // self.BLOCK][j] + np.count_nonzero(self.dataset[first:draw] == j)
        return int(self._order(j, n // self.kept[j])[n % self.kept[j]])

    def rows(self) -> list[int]:
        """All rows that are drawn, sorted."""
        return sorted(i for j, count in enumerate(self.counts) for i in self._order(j, 0)[:count].tolist())


def length_limit(policy: Policy, max_length: int | None) -> int:
    """The longest prompt + completion: --max_length, and never more than the model's context."""
    context = policy.hf.config.get_text_config().max_position_embeddings
    return context if max_length is None else min(max_length, context)


def check_length(row: dict, length: int, limit: int):
    """RowError for a row of more tokens than the limit."""
    if length > limit:
        raise RowError(f"{row['_source']}: {length} tokens with the images, more than the {limit} that "
                       f"the model's context and the length flags leave (nothing is ever cut; "
                       f"--overlong skip leaves such training rows out)")


# ------------------------------------------------------------------------------------------------------------
# Rows before step 1


class Size(NamedTuple):
    """What is known of a row once it was encoded."""

    prompt: int    # tokens, with the images
    answer: int    # tokens of the longest completion
    key: str = ""  # what the reference's log-probs of the row are stored under; "" where there are none


def group_key(tokens, pixels: dict, completions) -> str:
    """What a group's log-probs depend on besides the weights: prompt ids, pixels, completion ids."""
    digest = hashlib.sha256()
    named = [("tokens", tokens), *sorted(pixels.items()), *(("", c) for c in completions)]
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


class RowCache:
    """cache(row) -> its Size, from disk if an earlier run encoded a row of the same content.

    A row's key is the sha256 of what encode_group reads of it, images included; the folder is named after all
    else that an encoding depends on. A file is named after its own content, so that damage is noticed, and is
    never changed. A context manager: at its end what is new is written, also after an error.
    """

    def __init__(self, folder: str | Path, policy: Policy, processor, columns: tuple[str, ...]):
        self.policy, self.processor, self.columns = policy, processor, columns
        self.folder = Path(folder) / encoding_fingerprint(policy, processor, columns)
        self.known, self.new, self.computed = {}, {}, 0  # {key of a row: its Size as text}
        self.lock, self.stored = threading.RLock(), time.monotonic()

    def __enter__(self):
        for file in sorted(self.folder.glob("*.txt")):
            try:
                content = file.read_bytes()
                if hashlib.sha256(content).hexdigest() != file.stem:  # emptied by a power cut, perhaps
                    raise OSError(f"{file} is damaged")
            except OSError as error:
                print(f"warning: {error}: what it held is computed again", flush=True)
                continue
            self.known |= (line.split(" ", 1) for line in content.decode().splitlines())
        return self

    def __exit__(self, *_):
        self.store()
        self.known = {}

    def __call__(self, row: dict) -> Size:
        key = self.key(row)
        if key in self.known:
            prompt, answer, group = self.known[key].split(" ")
            return Size(int(prompt), int(answer), group)
        begun, completions = encode_answers(self.policy, self.processor, row, self.columns)
        tokens, pixels, _ = tokenize_prompt(self.processor, row, begun)  # no positions: nothing asks for them
        size = Size(len(tokens), max(map(len, completions), default=0),
                    group_key(tokens, pixels, completions) if self.columns else "")
        with self.lock:
            self.computed += 1
            if key is not None and (not row["images"] or key == self.key(row)):  # else an image changed
                self.known[key] = self.new[key] = " ".join(map(str, size))
            if time.monotonic() - self.stored > 60:  # a killed run keeps what it had measured by then
                self.store()
        return size

    def key(self, row: dict) -> str | None:
        """The row's key; None if an image cannot be found or read: encoding the row says what is wrong."""
        try:
            images = [image_digest(image, row) for image in row["images"]]
        except (RowError, OSError):
            return None
        content = [row["prompt"], row.get("_system"), images, *(row[column] for column in self.columns)]
        return hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()[:32]

    def store(self):
        """Write what is new to a file of its own. Without a folder to write to, a run only starts slower."""
        with self.lock:
            content = "".join(f"{key} {size}\n" for key, size in self.new.items()).encode()
            self.new, self.stored = {}, time.monotonic()
        if not content:
            return
        file = self.folder / f"{hashlib.sha256(content).hexdigest()}.txt"
        temporary = file.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")  # a shared folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.rename(file)
        except OSError as error:
            print(f"warning: {error}: the next start encodes these rows again", flush=True)


def encoding_fingerprint(policy: Policy, processor, columns: tuple[str, ...]) -> str:
    """What a row's encoding depends on besides the row: the processor with its tokenizer and chat template as
    save_pretrained writes them, the answer's columns and special ids, this file, the libraries, and the CPU,
    whose kernels may round pixels differently."""
    packages = ("torch", "torchvision", "transformers", "tokenizers", "jinja2", "pillow", "numpy")
    versions = [(name, found.version) for name in packages for found in distributions(name=name)]
    kinds = [type(part).__qualname__ for part in vars(processor).values()]
    digest = hashlib.sha256(repr((columns, policy.eos_ids, sorted(policy.never_sampled_ids), versions, kinds,
                                  torch.backends.cpu.get_cpu_capability())).encode())
    digest.update(Path(__file__).read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def measure_rows(rows, places, measure, limit: float, rank: int, workers: int) -> dict:
    """{i: measure(rows[i]), or what is wrong with the row as text} for these places, by `workers` threads;
    rank 0 shows a progress bar. A row longer than the limit is wrong, too."""
    def measured(i):
        try:
            row = rows[i]
            size = measure(row)
            check_length(row, size.prompt + size.answer, limit)
            return i, size
        except RowError as error:
            return i, str(error)

    found, step = {}, 8  # rows a thread takes at once: handing over single ones costs as much as short texts
    parts = [places[i:i + step] for i in range(0, len(places), step)]
    with tqdm(desc="rows", total=len(places), unit="row", delay=1, leave=False,
              disable=None if rank == 0 else True) as bar:
        for part in in_order(lambda part: [measured(i) for i in part], parts, workers):
            found |= part
            bar.update(len(part))
    return found


def gather_sizes(found: dict) -> dict[int, Size]:
    """The ranks' `measure_rows` together, in the order of rows; one RowError for all that are wrong. All
    ranks must call this."""
    found = dict(sorted(pair for part in all_gather_object(found) for pair in part.items()))
    refuse([size for size in found.values() if isinstance(size, str)])
    return found


def check_rows(rows, num_draws: int, seed: int, overlong: str, limit: int, rank: int, world_size: int,
               measure, sort_by: str | None = None, workers: int = 0, sees=False):
    """Read and measure every row that the run will visit, before it starts -> (its Plan, the rows' indices
    from the longest to the shortest, {index: Size}), alike on all ranks.

    measure(row) -> Size; it raises RowError for a row that cannot be used. Rows beyond `limit` are an error,
    too; with overlong "skip" they are left out, counted and printed, and others take their places, which are
    checked in turn. The ranks share the work, each with `workers` threads.
    """
    dropped, sizes, lengths = set(), {}, {}
    keys = None if sort_by is None else [row[sort_by] for row in rows]
    shares = getattr(rows, "shares", None)
    while True:
        plan = Plan([len(rows)] if shares is None else rows.sizes, num_draws, seed, dropped, keys, shares)
        visited = plan.rows()
        todo = [i for i in visited if i not in sizes]
        if not todo:
            break
        sizes |= gather_sizes(measure_rows(rows, todo[rank::world_size], measure,
                                           limit if overlong == "error" else math.inf, rank, workers))
        lengths = {i: size.prompt + size.answer for i, size in sizes.items()}
        dropped = {i for i, length in lengths.items() if length > limit}
    seen = report(rows, rank, sees)
    refuse([f"--columns {name}={column}: no row of --dataset has a column {column}"
            for name, column in getattr(rows, "renamed", {}).items()
            if ("named", column) not in seen and name != "images"])  # images=images: rows of text alone
    longest = sorted(visited, key=lambda i: (-lengths[i], i))
    if rank == 0:
        print(f"data: {len(rows)} rows, {len(longest)} of them in this run, {len(dropped)} skipped as longer "
              f"than {limit} tokens; lengths {lengths[longest[-1]]} to {lengths[longest[0]]}, "
              f"mean {sum(lengths[i] for i in longest) / len(longest):.0f}", flush=True)
    return plan, longest, sizes


def show_sample(processor, group):
    """Print what the model reads of a row, (Prompt, completions), decoded; image tokens as a count."""
    prompt, completions = group
    for name, ids in (("prompt", prompt.tokens), *(("completion", c) for c in completions)):
        text = processor.tokenizer.decode(ids)
        text = re.sub(r"(<[^<>]+>)\1{2,}", lambda run: f"{run[1]} x {len(run[0]) // len(run[1])}", text)
        print(f"data: {name} of {prompt.row['_source']}: {text!r}", flush=True)


def check_eval_rows(rows, limit: int, rank: int, world_size: int, measure, workers: int = 0):
    """This rank's held-out rows, and {index: Size} of all ranks'. Each is read, measured and checked; none is
    ever skipped."""
    if 0 < len(rows) < world_size:
        raise InputError(f"{len(rows)} held-out rows for {world_size} ranks: every rank needs at least one")
    mine = range(rank, len(rows), world_size)
    sizes = gather_sizes(measure_rows(rows, mine, measure, limit, rank, workers))
    report(rows, rank)
    return rows[rank::world_size], sizes  # of files: a view, which reads when asked


# ------------------------------------------------------------------------------------------------------------
# The built-in task, how many shapes are there?, and the tiny model for it

SHAPE_COLORS = ("red", "green", "blue", "orange", "purple", "black")


def draw_shapes(rng: random.Random, count: int) -> Image.Image:
    """A white 48 x 48 picture with `count` shapes, each in its own cell of a 3 x 3 grid."""
    image = Image.new("RGB", (48, 48), "white")
    draw = ImageDraw.Draw(image)
    for cell in rng.sample(range(9), count):
        x, y = 16 * (cell % 3) + rng.randint(1, 4), 16 * (cell // 3) + rng.randint(1, 4)
        box, color = (x, y, x + 10, y + 10), rng.choice(SHAPE_COLORS)
        kind = rng.choice(("circle", "square", "triangle"))
        if kind == "circle":
            draw.ellipse(box, fill=color)
        elif kind == "square":
            draw.rectangle(box, fill=color)
        else:
            draw.polygon([(x, y + 10), (x + 10, y + 10), (x + 5, y)], fill=color)
    return image


def shapes_rows(count: int, seed: int, split: str) -> list[dict]:
    """`count` rows of the task; a wrong number of shapes is the rejected answer. The splits share no key."""
    rows = []
    for i in range(count):
        rng = random.Random(f"{split} {seed} {i}")  # a str seeds by sha512: the same on every machine
        right = rng.randint(1, 6)
        wrong = rng.choice([n for n in range(1, 7) if n != right])
        say, gap = "<think>i see {0} shapes</think><answer>{0}</answer>".format, abs(right - wrong)
        p = 1 / (1 + math.exp(-gap))  # a judge with reward -|error|
        rows.append({"prompt": "how many shapes are there?", "images": [draw_shapes(rng, right)],
                     "solution": str(right), "chosen": say(right), "rejected": say(wrong), "margin": gap,
                     "chosen_probs": p, "chosen_probs_win": p, "chosen_probs_lose": 1 - p,
                     "_source": f"shapes {split} {i}", "_image_root": None})
    return rows


# The tiny model that answers it: half a million parameters of the real Qwen2.5-VL classes.

CHAT_TEMPLATE = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}\
{% if m['content'] is string %}{{ m['content'] }}\
{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TINY_CORPUS = [  # the words the tiny tokenizer knows
    "how many shapes are there?", "<think>i see shapes</think><answer></answer>", "user", "assistant",
    "which digit is this?", "this is a", "0 1 2 3 4 5 6 7 8 9"]


def build_tokenizer(corpus: list[str], specials: list[str], eos: str, pad: str):
    """A byte-level BPE tokenizer with the corpus's words as tokens; any other text encodes as bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"</?[a-z]+>|\s?[A-Za-z]+|\d|\s+|[^\sA-Za-z\d]")  # a tag, a word, a digit: one token each
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad,
                                   padding_side="left")


def build_tiny_vlm(folder: str | Path, seed: int = 0):
    """Write a random Qwen2.5-VL of half a million parameters, its tokenizer and processor (save_pretrained).

    Images up to 48 x 48 (patch 8, merge 2: nine image tokens). initializer_range 0.08 rather than 0.02: at
    this width it learns to look at the image about twice as fast.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|image_pad|>", "<|video_pad|>"]
    tokenizer = build_tokenizer(TINY_CORPUS, specials, eos="<|im_end|>", pad="<|endoftext|>")
    ids = dict(zip(specials, tokenizer.convert_tokens_to_ids(specials)))
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2048, initializer_range=0.08, bos_token_id=None,
                         eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
                         rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8,
                           spatial_merge_size=2, temporal_patch_size=2, window_size=96, out_hidden_size=128,
                           fullatt_block_indexes=[0, 1], initializer_range=0.08),
        tie_word_embeddings=True, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2,
                                               size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48})
    processor = without_video(Qwen2_5_VLProcessor)(image_processor=image_processor, tokenizer=tokenizer,
                                                   chat_template=CHAT_TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = Qwen2_5_VLForConditionalGeneration(config)
    hf.generation_config.eos_token_id = ids["<|im_end|>"]
    hf.generation_config.pad_token_id = ids["<|endoftext|>"]
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    # Where torchvision is installed, AutoProcessor insists on this file.
    (Path(folder) / "video_preprocessor_config.json").write_text(json.dumps(dict(
        video_processor_type="Qwen2VLVideoProcessor", patch_size=8, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48})) + "\n")


def start_model(args, output_dir: Path) -> str:
    """The folder or hub id that a run starts from. Without --model_name_or_path rank 0 writes the tiny model
    and trains it a little; the run then goes as if --model_name_or_path named that folder."""
    if args.model_name_or_path is not None:
        return args.model_name_or_path
    path = output_dir / ("cold_start" if args.cold_start_steps else "tiny_vlm")

    def make():
        if args.cold_start_steps:
            return cold_start(args, path)  # one that is done ends at once
        with loading(path):  # a full disk is an error of many kinds
            return build_tiny_vlm(path, args.seed)

    on_rank_0(str(path), make)
    return str(path / "final" if args.cold_start_steps else path)


def cold_start(args, folder: Path, accuracy: float = 0.4):
    """Train the tiny model on `shapes` until its sampled held-out answers pass `accuracy`: an ordinary run of
    train_dpo.py, as a process of its own in a folder of its own, started on one rank."""
    print(f"first up to {args.cold_start_steps} steps of SFT, so that the tiny model can answer at all "
          "(--cold_start_steps 0: none)", flush=True)
    command = [sys.executable, str(Path(__file__).with_name("train_dpo.py")), "--algo", "sft",
               "--max_steps", str(args.cold_start_steps), "--eval_steps", "2", "--eval_temperature", "1",
               "--stop_at_accuracy", str(accuracy), "--seed", str(args.seed), "--device", args.device,
               "--output_dir", str(folder)]
    env = {k: v for k, v in os.environ.items()
           if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
           and not k.startswith("TORCHELASTIC")}
    asked, child = [], None

    def pass_on(number, frame):
        asked.append(number)
        if child is not None:
            child.terminate()  # it writes a checkpoint and ends

    def end_with_parent():
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    child = subprocess.Popen(command, env=env, preexec_fn=end_with_parent)
    if asked:
        child.terminate()
    child.wait()  # not in the handler: it would wait for the lock that this wait holds
    for number, handler in before.items():
        signal.signal(number, handler)
    if asked:
        print(f"stopped in the cold start; the same command with --output_dir {folder.parent} goes on",
              file=sys.stderr, flush=True)
        sys.exit(128 + asked[0])
    if child.returncode or not (folder / "final").is_dir():
        raise InputError(f"the cold start was not finished (exit code {child.returncode}); see above")
