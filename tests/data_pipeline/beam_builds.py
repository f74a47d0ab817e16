"""Builds with Apache Beam, one after another: python beam_builds.py JOBS.json RESULTS.json

A job: arguments of `beam_build.build` with `tokenizer`, a directory, `skip_bad` true or false, and `block_bits`. Its
result: {"bad": [messages]} or {"error": [class, message]}. Paths that begin with fake:// are below FAKE_ROOT.
"""

import json
import os
import sys
from pathlib import Path

from apache_beam.io.filesystem import FileMetadata
from apache_beam.io.localfilesystem import LocalFileSystem

from data_pipeline import beam_build
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError

PREFIX = "fake://"


def here(path: str) -> str:
    return path.replace(PREFIX, os.environ["FAKE_ROOT"] + "/")


class FakeFileSystem(LocalFileSystem):
    """A file system with a scheme, like those of clouds."""

    @classmethod
    def scheme(cls):
        return "fake"

    def join(self, basepath, *paths):
        return "/".join([basepath, *paths])

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def mkdirs(self, path):
        super().mkdirs(here(path))

    def _list(self, dir_or_prefix):
        for file in super()._list(here(dir_or_prefix)):
            path = file.path.replace(os.environ["FAKE_ROOT"] + "/", PREFIX)
            yield FileMetadata(path, file.size_in_bytes, file.last_updated_in_seconds)

    def create(self, path, *arguments, **options):
        return super().create(here(path), *arguments, **options)

    def open(self, path, *arguments, **options):
        return super().open(here(path), *arguments, **options)

    def rename(self, source_file_names, destination_file_names):
        super().rename(list(map(here, source_file_names)), list(map(here, destination_file_names)))

    def exists(self, path):
        return super().exists(here(path))

    def delete(self, paths):
        super().delete(list(map(here, paths)))


def result(job: dict) -> dict:
    beam_build.BLOCK_BITS = job.pop("block_bits")
    inputs = {split or None: paths for split, paths in job.pop("inputs").items()}
    encoder, bad = Encoder.load(job.pop("tokenizer")), []
    skip_bad = (lambda error: bad.append(str(error))) if job.pop("skip_bad") else None
    try:
        beam_build.build(inputs, encoder, job.pop("output"), skip_bad=skip_bad, **job)
    except DataError as error:
        return {"error": [type(error).__name__, str(error)]}
    return {"bad": bad}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([result(job) for job in jobs]))
