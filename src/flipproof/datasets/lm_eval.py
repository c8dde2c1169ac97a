"""Multiple-choice tasks of EleutherAI's lm-evaluation-harness, as batches for `flipproof.models.Choices`.

Documents, prompts and right answers are the library's own; tokens are made by the rule of its `HFLM`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flipproof.errors import DataError

Batch = tuple[dict[str, Tensor], Tensor]
Metric = Literal["acc", "acc_norm", "acc_bytes"]

NOT_COUNTED = -100
"""Stands where the token that follows is not of the answer: what torch's cross entropy leaves out, too."""
FEWSHOT_SEED = 1234
"""What the library's evaluator draws the examples of a prompt with."""
NARROWLY = 1e-6
"""By what share a made-up answer wins: so little that a metric which divides by lengths, or shares probability out, is
not taken for one that goes by the largest sum."""
_LENGTH: dict[str, Callable[[str], int]] = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode("utf-8")),
}
_INSTEAD = {
    "generate_until": "assess what it writes instead: fp.Generation() on flipproof.models.Greedy(model, length=…)",
    "loglikelihood_rolling": "assess its perplexity instead: fp.Tokens() on windows of the text",
    "loglikelihood": "assess its tokens instead: fp.Tokens() with −100 where the context is",
}


@dataclass(frozen=True)
class _Document:
    """The rows of one question: (what is read, what follows), and which answer is right."""

    rows: tuple[tuple[list[int], list[int]], ...]
    lengths: tuple[int, ...]
    right: int


def lm_eval_batches(
    task: Any,
    tokenizer: Any,
    *,
    metric: Metric = "acc",
    limit: int | None = None,
    batch_size: int = 32,
    num_fewshot: int | None = None,
    longest: int | None = None,
    same_width: bool = False,
) -> list[Batch]:
    """A multiple-choice task of lm-eval: a sample is a document, its classes are the document's answers.

    With `flipproof.models.Choices` around the model, `fp.assess(…)` then gives the task's accuracy and what faults do
    to each document. Accuracy without faults is what `lm_eval.simple_evaluate` says of the same documents, but for ties
    within rounding: here log-likelihoods are summed in float64.

    Args:
        task: a name that lm-eval knows, such as "arc_easy"; or one of its task objects, of which this sets the requests
            and the seed of the examples, as the library's evaluator does.
        tokenizer: the model's, of Hugging Face. Whether it puts a token in front of a text is left to it, as `HFLM`
            leaves it.
        metric: "acc" judges by sums of log-likelihoods, "acc_norm" by sums divided by an answer's characters,
            "acc_bytes" by its bytes.
        limit: only the first so many documents.
        batch_size: documents a batch; the model reads one answer of each at a time.
        num_fewshot: examples in each prompt; None for what the task says, or none.
        longest: tokens that the model reads at most; the beginning of longer rows is left out, as the library does.
        same_width: whether rows are padded to the longest of all, not of their batch; `fp.Neurons()` takes layers that
            give as much in every batch.

    Returns:
        Batches of (inputs, targets): ``input_ids`` and ``continuation`` for `Choices`, ``lengths`` too unless it is
        "acc", and the number of the right answer, int64 (N,).

    Raises:
        DataError: if lm-eval is missing or knows no such task; the task is not multiple choice; a document has no or
            several right answers; or its metric is another than that of the largest score.
    """
    if metric not in _LENGTH:
        raise DataError(f"metric= takes 'acc', 'acc_norm' or 'acc_bytes', got {metric!r}")
    for name, value in (("limit", limit), ("batch_size", batch_size), ("longest", longest)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise DataError(f"{name}= takes a whole number from 1, got {value!r}")
    with _seeded():
        found = _load(task) if isinstance(task, str) else task
        title = _title(found)
        _check_kind(found, title)
        _ask_for(found, num_fewshot, title)
        found.build_all_requests(limit=limit)
        requests = sorted(found.instances, key=lambda one: (one.doc_id, one.idx))
        documents = [
            _read(found, f"document {number} of {title}", list(asked), tokenizer, metric, longest)
            for number, asked in groupby(requests, key=lambda one: one.doc_id)
        ]
    most = max(len(document.rows) for document in documents)
    once = all(read == document.rows[0][0] for document in documents for read, _ in document.rows)
    parts = [documents[first : first + batch_size] for first in range(0, len(documents), batch_size)]
    return [_batch(part, _width(documents if same_width else part), most, once, metric) for part in parts]


@contextmanager
def _seeded() -> Iterator[None]:
    """The seeds of the library's evaluator: some tasks shuffle their answers by the global generators."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002


def _load(name: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError(
            f"reading the task {name!r} takes lm-evaluation-harness: pip install 'flipproof[lm-eval]'"
        ) from error
    manager = TaskManager()
    if name not in manager.all_tasks:
        raise DataError(f"lm-eval knows no task {name!r}; `lm-eval ls tasks` lists those that it knows")
    if name not in manager.all_subtasks:
        raise DataError(f"{name!r} is several tasks of lm-eval; assess one at a time, as in `lm-eval ls subtasks`")
    return manager.load_task_or_group([name])[name]


def _title(task: Any) -> str:
    return str(getattr(getattr(task, "config", None), "task", None) or type(task).__name__)


def _check_kind(task: Any, title: str) -> None:
    kind = getattr(task, "OUTPUT_TYPE", None)
    if kind != "multiple_choice":
        raise DataError(
            f"{title} is no multiple-choice task but {kind!r}"
            + (f"; {_INSTEAD[kind]}" if kind in _INSTEAD else "; task= takes a name or a task object of lm-eval")
        )


def _ask_for(task: Any, num_fewshot: int | None, title: str) -> None:
    """Set the number of examples and their seed, as the library's evaluator does."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None:
        if isinstance(num_fewshot, bool) or not isinstance(num_fewshot, int) or num_fewshot < 0:
            raise DataError(f"num_fewshot= takes a whole number from 0, got {num_fewshot!r}")
        if own == 0 and num_fewshot:
            raise DataError(f"{title} says that it takes no examples, so num_fewshot={num_fewshot} cannot be had")
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _read(task: Any, where: str, requests: list[Any], tokenizer: Any, metric: Metric, longest: int | None) -> _Document:
    document = requests[0].doc
    choices = list(task.doc_to_choice(document))
    if any(len(request.args) != 2 for request in requests) or len(requests) < len(choices):
        raise DataError(
            f"{where}: expected a context and a continuation for each of {len(choices)} answers, and no more"
        )
    lengths = tuple(_LENGTH[metric](choice) for choice in choices)
    if not all(lengths):
        raise DataError(f"{where}: an answer is empty, and {metric} divides by its length; use metric='acc'")
    pairs = [request.args for request in requests[: len(choices)]]
    rows = tuple(_row(context, continuation, tokenizer, longest, where) for context, continuation in pairs)
    return _Document(rows, lengths, _right(task, where, document, lengths, len(requests) - len(choices), metric))


def _right(task: Any, where: str, document: Any, lengths: tuple[int, ...], more: int, metric: Metric) -> int:
    """The answer that the task calls right: each wins in turn, by made-up log-likelihoods.

    `more` requests follow those of the answers where the task has another metric, too, that needs them.
    """
    right = []
    for winner in range(len(lengths)):
        made_up = [
            (-length * (1 if one == winner else 1 + NARROWLY), one == winner) for one, length in enumerate(lengths)
        ]
        with np.errstate(all="ignore"):  # the task's other metrics may divide by the length of an empty answer
            found = task.process_results(document, made_up + [(-1.0, False)] * more)
        if found.get(metric) not in (0, 1):
            raise DataError(
                f"{where}: expected {metric} to be 0 or 1, got {found.get(metric)!r}; the task gives {sorted(found)}"
            )
        if found[metric]:
            right.append(winner)
    if len(right) != 1:
        raise DataError(
            f"{where}: {len(right) or 'none'} of {len(lengths)} answers are right by {metric}, where flipproof takes "
            f"one that is, and that the largest score wins; leave the document out of the task"
        )
    return right[0]


def _row(
    context: str, continuation: str, tokenizer: Any, longest: int | None, where: str
) -> tuple[list[int], list[int]]:
    """Tokens that are read, and those that follow them: −100 where these are not of the continuation.

    The rule is that of lm-eval's `HFLM` for causal models: blanks at the end of the context belong to the continuation;
    the continuation is what the whole has beyond the context's number of tokens; without a context, a token that begins
    (or ends) texts stands for it. The last token is not read, since nothing is asked about what follows it.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not context:
        asked = tokenizer.encode(continuation, add_special_tokens=False)
        if start is None:
            raise DataError(f"{where}: there is no context, and the tokenizer has no token that begins or ends a text")
        given, asked = (asked[:1], asked[1:]) if asked[:1] == [start] else ([start], asked)
    else:
        bare = context.rstrip()
        given = _encode(bare, tokenizer, start)
        asked = _encode(context + continuation, tokenizer, start)[len(given) :]
    if not given or not asked:
        raise DataError(
            f"{where}: the tokenizer makes {len(given)} tokens of the context {context[-20:]!r} and {len(asked)} more "
            f"of the answer {continuation!r}; both need one at least"
        )
    if longest is not None and len(asked) > longest:
        raise DataError(f"{where}: an answer has {len(asked):,} tokens, more than longest={longest:,}")
    whole = given + asked if longest is None else (given + asked)[-longest - 1 :]
    return whole[:-1], [NOT_COUNTED] * (len(whole) - 1 - len(asked)) + asked


def _encode(text: str, tokenizer: Any, start: int | None) -> list[int]:
    """Tokens of a text; the tokenizer puts no second token in front of one that begins with it."""
    begun = start is not None and text.startswith(tokenizer.decode(start))
    return list(tokenizer.encode(text, add_special_tokens=False) if begun else tokenizer.encode(text))


def _width(documents: list[_Document]) -> int:
    return max(len(read) for document in documents for read, _ in document.rows)


def _batch(documents: list[_Document], width: int, most: int, once: bool, metric: Metric) -> Batch:
    """Documents side by side.

    Rows are as long as the longest: their last token is repeated, so that no document depends on the number of a token
    that it does not have. An answer that is not there reads what the first one reads.
    """
    read = torch.zeros(len(documents), 1 if once else most, width, dtype=torch.int64)
    follows = torch.full((len(documents), most, width), NOT_COUNTED)
    lengths = torch.ones(len(documents), most, dtype=torch.float64)
    for i, document in enumerate(documents):
        for k in range(read.shape[1]):
            tokens = document.rows[k if k < len(document.rows) else 0][0]
            read[i, k] = torch.tensor(tokens + tokens[-1:] * (width - len(tokens)))
        for k, (_, tokens) in enumerate(document.rows):
            follows[i, k, : len(tokens)] = torch.tensor(tokens)
        lengths[i, : len(document.rows)] = torch.tensor(document.lengths, dtype=torch.float64)
    inputs = {"input_ids": read, "continuation": follows} | ({} if metric == "acc" else {"lengths": lengths})
    return inputs, torch.tensor([document.right for document in documents])
