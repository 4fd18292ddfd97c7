"""The cache of reference log-probs: one value a row, whoever asks, and nothing that is damaged or of another model."""

import errno
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch

import data
import model
import train_dpo

COLUMNS = "chosen", "rejected"


@pytest.fixture
def cached(loaded, tmp_path):
    """wanted keys -> a ReferenceCache of the tiny model, always in the same folder"""
    policy, _ = loaded("qwen2_5_vl")
    return lambda *wanted: train_dpo.ReferenceCache(str(tmp_path / "cache"), policy, set(wanted))


def groups_of(policy, processor, rows, size=4, rank=0, ranks=1):
    """The part of train_dpo.Groups that hands out batches, of rows that are all drawn once."""
    found = object.__new__(train_dpo.Groups)
    found.args = SimpleNamespace(per_device_train_batch_size=size, per_device_eval_batch_size=size, max_tokens_per_batch=None,
                                 dataloader_num_workers=0)
    found.run, found.policy, found.processor = SimpleNamespace(rank=rank, world_size=ranks), policy, processor
    found.columns, found.train, found.all_held_out, found.eval_sizes = COLUMNS, rows, [], {}
    found.plan = found.longest = list(range(len(rows)))
    found.sizes = {i: data.Size(0, 0, train_dpo.group_key(found.encode(row))) for i, row in enumerate(rows)}
    return found


@pytest.fixture(scope="module")
def rows():
    """Eight rows of uneven length, of which the last is the first once more."""
    made = data.shapes_rows(7, 0, "train")
    for i, row in enumerate(made):
        row["chosen"] = "<think>" + "see " * (3 * i) + row["chosen"]
    return [*made, made[0]]


def test_a_rows_first_value_stands(cached):
    """Two ranks wrote a row from different micro-batches into one file: what a run read hung on who wrote last."""
    first, second = cached("a", "b"), cached("a", "b")  # both have seen an empty folder
    first.store({"a": torch.ones(2)})
    second.store({"a": torch.zeros(2), "b": torch.ones(3)})
    for cache in (second, cached("a", "b")):
        assert torch.equal(cache.known["a"], torch.ones(2)) and torch.equal(cache.known["b"], torch.ones(3))
    assert cached("b").known.keys() == {"b"}, "what this run does not ask for is not held"


def test_a_batch_with_a_missing_row_is_computed_whole(loaded, cached, rows):
    """A run that found a part of a batch in the cache computed the other rows in a smaller batch, which differs in the
    last bits. Rows that are known keep what they have."""
    policy, processor = loaded("qwen2_5_vl")
    groups = groups_of(policy, processor, rows)
    keys = [groups.sizes[i].key for i in range(7)]

    def asked():
        return [[keys.index(train_dpo.group_key(g)) for g in batch] for batch in groups.batches_to_score(cached(*keys))]

    assert asked() == [[0, 1, 2, 3], [4, 5, 6]]
    cached(*keys).store({keys[0]: torch.zeros(3), keys[1]: torch.zeros(3)})
    assert asked() == [[0, 1, 2, 3], [4, 5, 6]]
    cached(*keys).add(policy, list(groups.batches_to_score(cached(*keys)))[:1], lambda: False)
    assert asked() == [[4, 5, 6]]
    known = cached(*keys).known
    assert known.keys() == {*keys[:4]} and not known[keys[0]].any() and not known[keys[1]].any()
    logps, *_ = policy(batch := policy.pack([groups.encode(rows[i]) for i in range(4)]))
    assert torch.equal(known[keys[2]], logps[4:6][batch["completion_mask"][4:6]])


def test_ranks_share_the_batches_of_one_rank(loaded, cached, rows):
    """Each rank cut the rows that it draws into batches of its own, so a row that two ranks draw had two values, and
    another number of ranks other ones."""
    policy, processor = loaded("qwen2_5_vl")

    def batches(rank, ranks):
        groups = groups_of(policy, processor, rows, 2, rank, ranks)
        return [[train_dpo.group_key(g) for g in batch] for batch in groups.batches_to_score(cached("none"))]

    one, (first, second) = batches(0, 1), (batches(rank, 2) for rank in (0, 1))
    assert [len(batch) for batch in one] == [2, 2, 2, 1]  # the eighth row is the first
    assert first == one[::2] and second == one[1::2]


def test_another_config_is_another_cache(folders, tmp_path):
    """Models of the same weights and another rope_theta, norm or ids read each other's log-probs: a first loss of 0.75
    in place of 0.6931. Where the folder lies changes nothing."""
    found = []
    for old, new in (("", ""), ('"rope_theta": 10000.0', '"rope_theta": 1000000.0'),
                     ('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.1')):
        copy = tmp_path / f"m{len(found)}"
        shutil.copytree(folders["qwen2_5_vl"], copy)
        text = (copy / "config.json").read_text()
        assert old in text
        (copy / "config.json").write_text(text.replace(old, new, 1))
        policy, _ = model.load_policy(str(copy))
        found.append(train_dpo.scorer_fingerprint(policy))
    plain, _ = model.load_policy(str(folders["qwen2_5_vl"]))
    found.append(train_dpo.scorer_fingerprint(model.load_policy(str(folders["qwen2_5_vl"]), "bfloat16")[0]))
    assert len(set(found)) == 4 and train_dpo.scorer_fingerprint(plain) == found[0]
    plain.never_sampled_ids = plain.never_sampled_ids - {max(plain.never_sampled_ids)}
    assert train_dpo.scorer_fingerprint(plain) not in found


def test_damage_is_noticed(cached, capsys):
    """A flipped bit of a file was used, and an emptied file ended the run: now what it held is computed again, and the new
    value stands."""
    cached("a", "b").store({"a": torch.ones(9), "b": torch.zeros(3)})
    (file,) = cached("a").folder.iterdir()
    content, rng = file.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert not cached("a", "b").known
    for cut in (0, 5, len(content) - 1):
        file.write_bytes(content[:cut])
        assert not cached("a", "b").known
    assert capsys.readouterr().out.count(f"{file} is damaged") == 303
    cached("a").store({"a": torch.full((9,), 2.0)})
    assert cached("a").known["a"].tolist() == [2.0] * 9


def test_the_folder_is_shared(cached, monkeypatch):
    """Files were readable by their writer alone, and what could not be read or written was called --output_dir."""
    before = os.umask(0o002)
    try:
        cached("a").store({"a": torch.ones(1)})
    finally:
        os.umask(before)
    folder = cached("a").folder
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, *folder.iterdir())] == ["0o775", "0o664"]
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(train_dpo.os, "access", lambda path, mode: False)
        assert cached("a").known
        with pytest.raises(model.InputError, match="--ref_cache .* cannot be written, and lacks 1 rows"):
            cached("a", "b")
    (folder / "000002.safetensors").mkdir()
    with pytest.raises(model.InputError, match="--ref_cache .*000002.safetensors"):
        cached("a")
    shutil.rmtree(folder.parent)
    folder.parent.write_text("a file")
    with pytest.raises(model.InputError, match="--ref_cache .*Not a directory"):
        cached("a")


def test_a_full_disk_leaves_nothing(cached, monkeypatch):
    """The line did not say which file nor how much room there is, and half a file stayed to fill the disk."""
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = cached("a", "b")
    cache.store({"a": torch.ones(1)})
    monkeypatch.setattr(train_dpo.os, "link", full)
    with pytest.raises(model.InputError, match="cannot be written: .*No space left on device; .* MB are free there"):
        cache.store({"b": torch.ones(1)})
    assert [file.name for file in cache.folder.iterdir()] == ["000001.safetensors"]


def test_a_changed_image_is_said(loaded, cached, rows):
    """A picture that was replaced while the run went on ended it with a KeyError."""
    policy, processor = loaded("qwen2_5_vl")
    group = groups_of(policy, processor, rows[:1]).encode(rows[0])
    with pytest.raises(model.InputError, match="shapes train 0: the row, or an image of it, has changed"):
        cached("a").logps([group], policy.pack([group]))
