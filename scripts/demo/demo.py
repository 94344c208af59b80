"""The recommender by hand: one question, p(yes) before and after SFT, and a user's ranked list.

In:  {data_dir}/items.jsonl, {output_dir}/{system}/test.jsonl, user_preferences.jsonl, adapter/
Out: a page at http://127.0.0.1:7860 that only this machine can open

    bash scripts/demo.sh configs/sample.yaml

Questions are those of stage 4, scores those of stage 6. Sample: seconds on 2 CPU cores.
"""

from mllmrec.stage.main import run_main

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass
from scipy.stats import rankdata

from mllmrec.data.images import check_item_images, open_image
from mllmrec.prompts.templates import plain_text
from mllmrec.ranking.datasets import DatasetOptions
from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.ranking.row_checks import check_row_images
from mllmrec.ranking.rows import replace_preference
from mllmrec.ranking.training_options import RankerOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.schema import Row
from mllmrec.stage.scripts import load_script

SECTION = "score"
NOT_HERE = {"--hide", "--split", "--pad_images"}  # options of stage 6
HEADERS = ["rank before", "rank after", "candidate", "p(yes) before", "p(yes) after", ""]
StageOptions = load_script("MLLM-MSR/test/test_with_llava_sft.py").Options


@dataclass
class Options(StageOptions):
    port: int = option(7860, "port of the page", ge=1, le=65535)


class Recommender:
    """The model with and without its adapter, and the data of a finished run."""

    def __init__(self, options: RankerOptions, questions: DatasetOptions) -> None:
        from mllmrec.models.adapters import check_adapter, check_use, load_adapter
        from mllmrec.ranking.answers import answer_set
        from mllmrec.ranking.reader import RowReader, load_ranker

        folder = options.system_dir
        self.items_path = Path(options.data_dir) / "items.jsonl"
        self.items = read_by_id(self.items_path, "item_id")
        check_item_images(self.items, self.items_path, options.data_dir, options.image_roots)
        rows = read_rows(folder / "test.jsonl")
        check_row_images(rows, folder / "test.jsonl", options)
        self.lists: dict[str, list[Row]] = {}
        for row in rows:
            self.lists.setdefault(row["user_id"], []).append(row)
        preferences = read_rows(folder / "user_preferences.jsonl")
        self.preferences = {row["user_id"]: row["preference"] for row in preferences}
        adapter = Path(options.adapter or folder / "adapter")
        check_adapter(adapter, options.model)
        check_use(adapter, options, options.allow_other)
        model, chat = load_ranker(options)
        self.model = load_adapter(model, adapter, options.model)
        answers = answer_set("yes_no", options)
        self.reader = RowReader(chat, folder, options.max_text_tokens, answers=answers)
        self.format = QuestionFormat(
            questions.domain, questions.recommend_prompt, questions.max_title_characters
        )

    def scores(self, rows: Sequence[Row]) -> list[tuple[float, float]]:
        """(p(yes) before, after SFT) of each row, as stage 6 computes them."""
        from mllmrec.ranking.scoring import probability, score_rows

        def score() -> list[float]:
            found = dict(score_rows(self.model, self.reader, rows))
            return [probability(yes, no) for no, yes in (found[n] for n in range(len(rows)))]

        with self.model.disable_adapter():
            before = score()
        return list(zip(before, score(), strict=True))

    def ask(self, preference: str, title: str, image: str | None) -> tuple[str, float, float]:
        """(question as the model gets it, p(yes) before, after SFT). image: path, None without."""
        name = os.path.abspath(image) if image and self.reader.chat.takes_images else None
        candidate = Candidate("user", "item", title, name, 0)
        row = candidate_row(candidate, preference, self.format, with_answer=False)
        [(before, after)] = self.scores([row])
        return self.reader.prompt(row)[0], before, after

    def rank(self, user: str, preference: str) -> list[list[Any]]:
        """The user's candidates as lines of HEADERS, the best after SFT first."""
        rows = [replace_preference(row, plain_text(preference)) for row in self.lists[user]]
        scores = self.scores(rows)
        # Ties: their mean rank, as in the report.
        ranks = [rankdata([-pair[side] for pair in scores]).tolist() for side in (0, 1)]
        lines = []
        for before, after, row, pair in zip(*ranks, rows, scores, strict=True):
            title, mark = self.items[row["item_id"]]["title"], "target" if row["label"] else ""
            lines.append([before, after, title, round(pair[0], 3), round(pair[1], 3), mark])
        return sorted(lines, key=lambda line: line[1])

    def image(self, item_id: str) -> str | None:
        """Path of an item's image."""
        name = self.items[item_id]["image"]
        return str(self.items_path.parent / name) if name else None


def page(recommender: Recommender) -> Any:
    """The page; its parts call the recommender."""
    import gradio

    users = list(recommender.lists)

    def choices(user: str) -> list[tuple[str, str]]:
        own = [row["item_id"] for row in recommender.lists[user]]
        order = [*own, *(item for item in recommender.items if item not in own)]
        return [(f"{item}: {recommender.items[item]['title']}", item) for item in order]

    def choose_user(user: str) -> tuple[str, Any]:
        listed = choices(user)
        return recommender.preferences[user], gradio.Dropdown(listed, value=listed[0][1])

    def choose_item(item: str) -> tuple[str, Any]:
        path = recommender.image(item)
        return recommender.items[item]["title"], open_image(path) if path else None

    def ask(preference: str, item: str, title: str, upload: str | None) -> tuple[str, str, str]:
        image = upload or recommender.image(item)
        question, before, after = recommender.ask(preference, title, image)
        return question, f"{before:.6f}", f"{after:.6f}"

    with gradio.Blocks(title="MLLM-MSR by hand", analytics_enabled=False) as blocks:
        gradio.Markdown("# MLLM-MSR by hand")
        with gradio.Row():
            with gradio.Column():
                user = gradio.Dropdown(users, value=users[0], label="user")
                preference = gradio.Textbox(
                    recommender.preferences[users[0]], label="preference", elem_id="preference"
                )
                first = choices(users[0])
                item = gradio.Dropdown(first, value=first[0][1], label="item")
                title, cover = choose_item(first[0][1])
                title = gradio.Textbox(title, label="title", elem_id="title")
                cover = gradio.Image(cover, label="its image", interactive=False)
                upload = gradio.Image(type="filepath", label="another image", sources=["upload"])
            with gradio.Column():
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
                question = gradio.Textbox(label="question, as the model gets it", lines=6)
                before = gradio.Textbox(label="p(yes) before SFT", elem_id="before")
                after = gradio.Textbox(label="p(yes) after SFT", elem_id="after")
                rank = gradio.Button("Rank the user's candidates", elem_id="rank")
                ranked = gradio.Dataframe(headers=HEADERS, label="candidates", elem_id="ranked")
        user.change(choose_user, user, [preference, item])
        item.change(choose_item, item, [title, cover])
        button.click(ask, [preference, item, title, upload], [question, before, after])
        rank.click(recommender.rank, [user, preference], ranked)
    return blocks


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "demo")
    # Configs may set them for stage 6.
    if refused := {word.split("=")[0] for word in options.words} & NOT_HERE:
        raise InputError(f"the demo has no {', '.join(sorted(refused))}; leave it out")
    words = ["--config", options.config, "--domain", options.domain]
    recommender = Recommender(options, parse_options(DatasetOptions, "datasets", words))
    page(recommender).launch(server_name="127.0.0.1", server_port=options.port, share=False)


if __name__ == "__main__":
    run_main(main)
