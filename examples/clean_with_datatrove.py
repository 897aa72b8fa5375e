"""Clean a corpus with datatrove before `elo prepare`: language, repetition, and near duplicates (MinHash).

    pip install 'datatrove[io,processing]'
    python examples/clean_with_datatrove.py data/ko cleaned/ko --language ko

`cleaned/ko/clean` is then a corpus: `data.corpora: {ko: cleaned/ko/clean}`. Each step resumes: datatrove keeps a record
of finished tasks in `cleaned/ko/logs`.
"""

import argparse
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherRepetitionFilter, LanguageFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.typeshelper import Languages

# 14 buckets of 8 hashes find about 92 % of the pairs with 80 % of their n-grams in common.
CONFIG = MinhashConfig(num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(hash_fc="sha1"))


def clean(source: Path, output: Path, *, language: str | None = None, tasks: int = 4, workers: int = 2) -> Path:
    """Filter and deduplicate the JSON lines in `source`; return the folder with the remaining documents."""
    words = language or Languages.english  # how texts are divided into words

    def run(name: str, steps: list, num_tasks: int = tasks) -> None:
        LocalPipelineExecutor(steps, tasks=num_tasks, workers=workers, logging_dir=str(output / "logs" / name)).run()

    filtered, signatures, buckets, remove = (
        str(output / name) for name in ("filtered", "signatures", "buckets", "ids")
    )
    filters = [GopherRepetitionFilter(language=words)]
    if language is not None:  # downloads a fastText model
        filters.insert(0, LanguageFilter(languages=[language]))
    run("filter", [JsonlReader(str(source)), *filters, JsonlWriter(filtered)])
    run("signatures", [JsonlReader(filtered), MinhashDedupSignature(signatures, config=CONFIG, language=words)])
    run("buckets", [MinhashDedupBuckets(signatures, buckets, config=CONFIG)], CONFIG.num_buckets)
    run("cluster", [MinhashDedupCluster(buckets, remove, config=CONFIG)], 1)
    run("remove", [JsonlReader(filtered), MinhashDedupFilter(remove), JsonlWriter(str(output / "clean"))])
    return output / "clean"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of .jsonl or .jsonl.gz files")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--language", help="keep documents in this language (ISO 639-1)")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    clean(given.source, given.output, language=given.language, tasks=given.tasks, workers=given.workers)
