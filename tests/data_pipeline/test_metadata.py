import shutil

import pytest

from data_pipeline.batches import training_batches
from data_pipeline.errors import DataError
from data_pipeline.metadata import FILE, Metadata, length_histogram, length_range, verify
from data_pipeline.shards import open_dataset


@pytest.fixture
def copy(dataset_directory, tmp_path):
    return shutil.copytree(dataset_directory, tmp_path / "data")


def a_shard(directory):
    return sorted(directory.glob("*train*"))[1]


def test_an_intact_dataset_verifies(copy):
    assert verify(copy) == Metadata.load(copy)


def test_truncated_shard_is_named_with_the_offset_where_it_ends(copy):
    shard = a_shard(copy)
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    end = rf"it ends at offset {len(content) - 7}, {len(content)} bytes were written"
    with pytest.raises(DataError, match=f"{shard.name}: the shard is truncated: {end}"):
        verify(copy)


def test_corrupt_shard_is_named_with_the_offset_of_the_broken_record(copy):
    shard = a_shard(copy)
    data = bytearray(shard.read_bytes())
    first = 16 + int.from_bytes(data[:8], "little")  # TFRecord: length, its checksum, the record, its checksum
    data[first + 20] ^= 1  # in the second record, which begins after its length and the checksum of the length
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"{shard.name}: the shard is corrupt at offset {first + 12};"):
        verify(copy)


def test_shard_with_records_in_another_order_is_named(copy):
    shard = a_shard(copy)
    data = shard.read_bytes()
    first = 16 + int.from_bytes(data[:8], "little")  # the first record is moved to the end
    shard.write_bytes(data[first:] + data[:first])
    with pytest.raises(DataError, match="every record is intact, but they are not those that were written"):
        verify(copy)


def test_missing_shard_is_named(copy):
    a_shard(copy).unlink()
    with pytest.raises(DataError, match="00001-of-00004: the shard is missing"):
        verify(copy)


def test_a_path_in_the_metadata_never_leaves_the_directory(copy, tmp_path):
    name = a_shard(copy).name
    (tmp_path / name).write_bytes(a_shard(copy).read_bytes())
    text = (copy / FILE).read_text().replace(name, f"../{name}")
    (copy / FILE).write_text(text)
    with pytest.raises(DataError, match="the shard is missing"):
        verify(copy)


def test_another_directory_is_not_a_dataset(tmp_path):
    with pytest.raises(DataError, match=r"not a dataset, metadata\.json cannot be read"):
        verify(tmp_path)
    (tmp_path / FILE).write_text('{"format": "jaxprm-trajectories", "version": 2}')
    with pytest.raises(DataError, match=r"metadata\.json: not the metadata of a dataset.*build it again"):
        verify(tmp_path)


def break_shard(directory, index, split="train"):
    """Truncates, corrupts or removes a shard; returns its name."""
    shard = sorted(directory.glob(f"*-{split}.tfrecord*"))[index]
    content = shard.read_bytes()
    broken = [content[:-7], content[:40] + bytes([content[40] ^ 1]) + content[41:], None][index % 3]
    shard.unlink() if broken is None else shard.write_bytes(broken)
    return shard.name


@pytest.mark.parametrize("broken", [[0], [1], [2], [3], [0, 2]])
def test_broken_shards_are_left_out_with_skip_bad_and_the_others_are_read(dataset_directory, copy, broken):
    intact = open_dataset(dataset_directory)
    names = [break_shard(copy, index) for index in broken]
    with pytest.raises(DataError, match=names[0]):
        open_dataset(copy)
    dataset = open_dataset(copy, skip_bad=True)
    assert list(dataset.broken) == names and all(name in str(dataset.broken[name]) for name in names)
    assert dataset.skipped("train") == (len(broken), 10 * len(broken)) and dataset.skipped("validation") == (0, 0)
    left = [index for index in range(40) if index // 10 not in broken]  # four shards of ten
    before, split = intact.split("train"), dataset.split("train")
    assert split.ids == [before.ids[index] for index in left]
    for number, index in enumerate(left):
        tokens = split.tokens[slice(*split.token_starts[number : number + 2])]
        assert tokens.tolist() == before.tokens[slice(*before.token_starts[index : index + 2])].tolist()
    assert dataset.split("validation").ids == intact.split("validation").ids


def test_skip_bad_does_not_change_an_intact_dataset(dataset_directory):
    dataset = open_dataset(dataset_directory, skip_bad=True)
    assert not dataset.broken and dataset.skipped("train") == (0, 0)
    assert dataset.fingerprint == dataset.metadata.fingerprint == open_dataset(dataset_directory).fingerprint


def test_a_split_without_an_intact_shard_is_an_error(copy):
    for index in reversed(range(4)):
        break_shard(copy, index)
    with pytest.raises(DataError, match="no shard of split train is intact; build the dataset again"):
        open_dataset(copy, skip_bad=True).split("train")


def test_a_position_is_valid_only_with_the_same_shards_left_out(dataset_directory, copy):
    shape = {"rows": 2, "length": 512, "steps_per_row": 32, "epochs": 2, "seed": 0}
    break_shard(copy, 1)
    batches = training_batches(open_dataset(copy, skip_bad=True), **shape)
    first = next(batches)
    state = batches.save_state()
    remaining = [batch["tokens"].tolist() for batch in batches]
    again = training_batches(open_dataset(copy, skip_bad=True), **shape)
    assert next(again)["tokens"].tolist() == first["tokens"].tolist()
    again.restore_state(state)
    assert [batch["tokens"].tolist() for batch in again] == remaining
    break_shard(copy, 3)
    for other in (copy, dataset_directory):  # one more is broken, or all are intact again
        with pytest.raises(DataError, match="the saved data position belongs to other batches"):
            training_batches(open_dataset(other, skip_bad=True), **shape).restore_state(state)


def test_lengths_are_counted_by_bin_and_bins_have_names():
    counts = length_histogram([1, 31, 32, 200, 32768, 10**6])
    assert counts == {"0": 2, "32": 1, "192": 1, "32768": 2}
    assert list(map(length_range, counts)) == ["0 to 31", "32 to 63", "192 to 255", "32768 and more"]
