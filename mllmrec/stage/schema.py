"""The files that stages exchange: the keys of one line, and the script that writes the file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FileSchema:
    """keys: those that every line has; maker: the script that writes the file."""

    keys: tuple[str, ...]
    maker: str


_ROW = ("user_id", "item_id", "label", "images", "messages")
SCHEMAS = {
    "items.jsonl": FileSchema(("item_id", "title", "image"), "scripts/01_prepare_data.sh"),
    "users.jsonl": FileSchema(
        ("user_id", "history", "target", "negatives", "split", "fold"), "scripts/01_prepare_data.sh"
    ),
    "image_summaries.jsonl": FileSchema(("item_id", "summary"), "scripts/02_image_summary.sh"),
    "user_preferences.jsonl": FileSchema(
        ("user_id", "preference", "blocks"), "scripts/03_preference.sh"
    ),
    "train.jsonl": FileSchema(_ROW, "scripts/04_datasets.sh"),
    "validation.jsonl": FileSchema(_ROW, "scripts/04_datasets.sh"),
    "test.jsonl": FileSchema(_ROW, "scripts/04_datasets.sh"),
    "scores.jsonl": FileSchema(
        ("user_id", "item_id", "label", "score", "logits"), "scripts/06_score.sh"
    ),
}
ID_KEYS = ("item_id", "user_id", "target")  # ids are strings everywhere
