"""Writes documents as a prepared TFDS directory with C4's features, without TensorFlow."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Document:
    """One example of C4, where every feature is text, even the length."""

    text: str
    url: str = ""
    timestamp: str = "1970-01-01T00:00:00Z"
    content_type: str = "text/plain"

    def to_example(self) -> dict[str, str]:
        """The features by their names in C4."""
        return {
            "text": self.text,
            "url": self.url,
            "timestamp": self.timestamp,
            "content-type": self.content_type,
            "content-length": str(len(self.text.encode("utf-8", errors="replace"))),
        }


def prepared_directory(data_dir: str | Path, name: str, config: str, version: str) -> Path:
    """Where TFDS keeps a version of a dataset."""
    return Path(data_dir) / name / config / version


def write_dataset(
    splits: Mapping[str, Sequence[Document]],
    *,
    name: str,
    config: str,
    version: str,
    data_dir: str | Path,
    num_shards: int,
) -> Path:
    """Writes ArrayRecord shards and TFDS's metadata; returns the prepared directory.

    The directory appears complete or not at all.
    """
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class DocumentBuilder(tfds.core.GeneratorBasedBuilder):
            """Yields the given documents."""

            __module__ = name  # not a package, in which TFDS would look for checksums
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]  # noqa: RUF012

            def _info(self):
                names = Document("").to_example()
                features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in names})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for i, document in enumerate(splits[split]):
                    yield i, document.to_example()

    DocumentBuilder.name = name
    builder = DocumentBuilder(data_dir=str(data_dir), config=config, file_format="array_record")
    num_shards = min([num_shards, *map(len, splits.values())])  # TFDS refuses empty shards
    how = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=num_shards)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare(download_config=how)
    return prepared_directory(data_dir, name, config, version)
