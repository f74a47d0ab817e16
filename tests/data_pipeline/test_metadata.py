import shutil

import pytest

from data_pipeline.errors import DataError
from data_pipeline.metadata import FILE, Metadata, verify


@pytest.fixture
def copy(dataset_directory, tmp_path):
    return shutil.copytree(dataset_directory, tmp_path / "data")


def a_shard(directory):
    return sorted(directory.glob("*train*"))[1]


def test_a_whole_dataset_verifies(copy):
    assert verify(copy) == Metadata.load(copy)


def test_truncated_shard_is_named_with_both_sizes(copy):
    shard = a_shard(copy)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=f"{shard.name}: the shard is truncated: {len(whole) - 7} bytes, {len(whole)} "):
        verify(copy)


def test_corrupt_shard_is_named_with_the_offset_of_the_broken_record(copy):
    shard = a_shard(copy)
    data = bytearray(shard.read_bytes())
    first = 16 + int.from_bytes(data[:8], "little")  # TFRecord: length, its checksum, the record, its checksum
    data[first + 20] ^= 1  # in the second record, which begins behind its length and the checksum of that
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"{shard.name}: the shard is corrupt at offset {first + 12};"):
        verify(copy)


def test_shard_of_whole_records_in_another_order_is_found(copy):
    shard = a_shard(copy)
    data = shard.read_bytes()
    first = 16 + int.from_bytes(data[:8], "little")  # the first record is moved to the end
    shard.write_bytes(data[first:] + data[:first])
    with pytest.raises(DataError, match="every record is whole, but they are not those that were written"):
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
