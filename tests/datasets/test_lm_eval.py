"""lm-evaluation-harness's tasks, against rows read one by one, and against the library where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import flipproof as fp
from flipproof.datasets.lm_eval import lm_eval_batches
from flipproof.errors import DataError, ModelError
from flipproof.models import Choices, small_gpt
from flipproof.spaces.contract import Faults

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "dog",
    "ran",
    "far",
    "away",
    "red",
    "blue",
    "green",
    "sky",
    "water",
    "fire",
)
LIBRARY = importlib.util.find_spec("lm_eval") is not None


def questions(count: int = 9) -> list[dict[str, Any]]:
    """Of one to nine words, with three or four answers of one to four."""
    draw = np.random.default_rng(0)

    def some(number: int) -> str:
        return " ".join(draw.choice(WORDS, number))

    return [
        {
            "question": some(1 + i % 9),
            "choices": [some(int(n)) for n in draw.integers(1, 5, 4 if i % 3 else 3)],
            "gold": i % 3,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    blank = Tokenizer(models.BPE())
    blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    blank.train_from_iterator([" ".join(WORDS)], learn)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=blank, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=48, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@dataclass
class Asked:
    """A request, as lm-eval keeps it."""

    doc: dict[str, Any]
    doc_id: int
    idx: int
    args: tuple[Any, ...]


class Task:
    """What is used of lm-eval's tasks."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, documents: list[dict[str, Any]], examples: int | None = None) -> None:
        self.documents, self.settings, self.seed = documents, {"num_fewshot": examples}, -1

    def get_config(self, key: str) -> Any:
        return self.settings[key]

    def set_config(self, key: str, value: Any) -> None:
        self.settings[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed

    def build_all_requests(self, limit: int | None = None) -> None:
        self.instances = [
            Asked(one, i, k, (one["question"], " " + choice))
            for i, one in enumerate(self.documents[:limit])
            for k, choice in enumerate(one["choices"])
        ]

    def doc_to_choice(self, one: dict[str, Any]) -> list[str]:
        return list(one["choices"])

    def process_results(self, one: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
        sums = np.array([found for found, _ in results])
        characters = np.array([len(choice) for choice in one["choices"]])
        return {
            "acc": float(sums.argmax() == one["gold"]),
            "acc_norm": float((sums / characters).argmax() == one["gold"]),
        }


def slowly(network: Any, tokenizer: Any, documents: list[dict[str, Any]]) -> list[list[float]]:
    """Log-likelihoods of each answer, each row alone and unpadded."""
    found = []
    for one in documents:
        found.append([])
        for choice in one["choices"]:
            start = len(tokenizer.encode(one["question"]))
            tokens = torch.tensor([tokenizer.encode(one["question"] + " " + choice)])
            with torch.no_grad():
                chances = network(tokens).logits[0].double().log_softmax(dim=-1)
            found[-1].append(sum(float(chances[t - 1, tokens[0, t]]) for t in range(start, tokens.shape[1])))
    return found


def scores(network: Any, data: Any) -> Any:
    with torch.no_grad():
        return torch.cat([Choices(network)(**inputs) for inputs, _ in data])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_those_of_each_row_alone(network, tokenizer, batch_size):
    documents = questions()
    data = lm_eval_batches(Task(documents), tokenizer, batch_size=batch_size)
    assert torch.cat([targets for _, targets in data]).tolist() == [one["gold"] for one in documents]
    found = scores(network, data)
    for row, expected in zip(found.tolist(), slowly(network, tokenizer, documents), strict=True):
        assert row[: len(expected)] == pytest.approx(expected, abs=2e-5)
        assert row[len(expected) :] == [-torch.inf] * (4 - len(expected))


def test_padding_to_the_longest_of_all(network, tokenizer):
    documents = questions()
    data = lm_eval_batches(Task(documents), tokenizer, batch_size=2, same_width=True)
    assert len({inputs["input_ids"].shape[1:] for inputs, _ in data}) == 1
    alone = lm_eval_batches(Task(documents), tokenizer, batch_size=1)
    assert len({inputs["input_ids"].shape[2] for inputs, _ in alone}) > 1
    assert torch.allclose(scores(network, data), scores(network, alone), atol=2e-5)


def test_answers_of_one_token_are_read_once(network, tokenizer):
    documents = [{**one, "choices": ["A", "B", "C"]} for one in questions()]
    data = lm_eval_batches(Task(documents), tokenizer)
    ((inputs, _),) = data
    assert inputs["input_ids"].shape[1] == 1
    assert torch.allclose(
        scores(network, data), torch.tensor(slowly(network, tokenizer, documents)).double(), atol=2e-5
    )


def test_lengths_divide_the_sums(network, tokenizer):
    documents = questions()
    sums, norm = (lm_eval_batches(Task(documents), tokenizer, metric=metric) for metric in ("acc", "acc_norm"))
    characters = torch.ones(9, 4)
    for i, one in enumerate(documents):
        characters[i, : len(one["choices"])] = torch.tensor([len(choice) for choice in one["choices"]])
    assert torch.equal(scores(network, norm), scores(network, sums) / characters)


def test_rows_are_cut_at_their_beginning(network, tokenizer):
    documents = questions()
    data = lm_eval_batches(Task(documents), tokenizer, longest=12)
    full = lm_eval_batches(Task(documents), tokenizer)
    cut, whole = data[0][0], full[0][0]
    assert cut["input_ids"].shape[2] == 12 < whole["input_ids"].shape[2]
    for i in range(9):
        for k in range(len(documents[i]["choices"])):
            before, after = (one["continuation"][i, k] for one in (whole, cut))
            assert before[before != -100].tolist() == after[after != -100].tolist()
    with pytest.raises(DataError, match="more than longest=1"):
        lm_eval_batches(Task(documents), tokenizer, longest=1)
    with pytest.raises(DataError, match="say longest=48"):
        Choices(network)(torch.zeros(1, 1, 49, dtype=torch.int64), torch.zeros(1, 2, 49, dtype=torch.int64))


def test_faults_hit_the_model_inside(network, tokenizer):
    """All 8 biases of the last LayerNorm with a bit flipped: outcomes and accuracy as of rows that are read alone."""
    documents, name = questions(), "transformer.ln_f.bias"
    data = lm_eval_batches(Task(documents), tokenizer, batch_size=4)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = fp.assess(
        Choices(network).eval(), data, faults=fp.BitPosition([31, 22, 30]), trials=1, audit=1.0,
        where=fp.Parameters(include=f"model.{name}"),
    )  # fmt: skip
    assert found.bits == 8 * 32
    golden = [int(np.argmax(row)) for row in slowly(network, tokenizer, documents)]
    right = [one["gold"] for one in documents]
    assert found.golden == {"accuracy": pytest.approx(np.mean(np.equal(golden, right)))}
    assert len(found.trials) == 3
    assert found.trials["critical_sdc"].sum() > 0
    for _, trial in found.trials.iterrows():
        faulty = copy.deepcopy(network)
        faulty.get_parameter(name).data.numpy().view(np.uint32)[:] ^= np.uint32(1 << int(trial["bit"]))
        answers = slowly(faulty, tokenizer, documents)
        due = [bool(np.isnan(row).any()) for row in answers]
        now = [-1 if lost else int(np.argmax(row)) for row, lost in zip(answers, due, strict=True)]
        assert trial["due"] == sum(due)
        assert trial["critical_sdc"] == sum(a != b and not lost for a, b, lost in zip(now, golden, due, strict=True))
        assert trial["accuracy"] == pytest.approx(np.mean(np.equal(now, right)))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_one_flip(network, tokenizer):
    documents = questions(4)
    data, model = lm_eval_batches(Task(documents), tokenizer), Choices(network).eval()
    space = fp.FaultSpace(model)
    site = next(one for one in space.sites if one.name == "model.transformer.h.0.attn.c_attn.weight")
    draw = Faults(np.array([site.offset + 32 * 5 + 29]))  # the second highest bit of the exponent of value 5
    with space.corrupted(draw):
        hit = scores(network, data)
    faulty = copy.deepcopy(network)
    faulty.transformer.h[0].attn.c_attn.weight.data.view(-1).numpy().view(np.uint32)[5] ^= np.uint32(1 << 29)
    assert torch.equal(hit, scores(faulty, data))
    assert not torch.equal(hit, scores(network, data))


def test_neurons_count_documents():
    """Layers are called once an answer."""
    torch.manual_seed(0)
    model = Choices(small_gpt(vocabulary=20, context=8)).eval()
    draw = torch.Generator().manual_seed(1)
    read = torch.randint(20, (6, 3, 5), generator=draw)
    follows = torch.randint(20, (6, 3, 5), generator=draw)
    follows[:, :, :3] = -100
    data = [({"input_ids": read, "continuation": follows}, torch.arange(6) % 3)]
    found = fp.assess(
        model, data, faults=fp.RandomBits(1), trials=2, where=fp.Neurons(include="model.head"), audit=1.0
    )  # fmt: skip
    assert found.bits == 3 * 5 * 20 * 32


class TestRefused:
    def test_other_kinds_of_tasks(self, tokenizer):
        for kind, instead in (
            ("generate_until", "models.Greedy"),
            ("loglikelihood_rolling", r"fp\.Tokens"),
            ("loglikelihood", r"fp\.Tokens"),
            (None, "a task object of lm-eval"),
        ):
            task = Task(questions())
            task.OUTPUT_TYPE = kind
            with pytest.raises(DataError, match=instead):
                lm_eval_batches(task, tokenizer)

    def test_several_or_no_right_answers(self, tokenizer):
        task = Task(questions())
        for answer, words in ((1.0, "3 of 3 answers"), (0.0, "none of 3 answers")):
            task.process_results = lambda document, results, answer=answer: {"acc": answer}
            with pytest.raises(DataError, match=f"document 0 of Task: {words} are right by acc"):
                lm_eval_batches(task, tokenizer)

    def test_metrics_that_do_not_go_by_the_largest_score(self, tokenizer):
        task = Task(questions())
        with pytest.raises(DataError, match=r"expected acc_bytes to be 0 or 1, got None; the task gives \['acc'"):
            lm_eval_batches(task, tokenizer, metric="acc_bytes")
        true = Task.process_results
        task.process_results = lambda *given: {"acc": true(task, *given)["acc_norm"]}  # divides by lengths
        with pytest.raises(DataError, match="are right by acc"):
            lm_eval_batches(task, tokenizer)
        task.process_results = lambda document, results: {"acc": float(np.exp(results[0][0]))}
        with pytest.raises(DataError, match=r"expected acc to be 0 or 1, got 0\.3"):
            lm_eval_batches(task, tokenizer)

    def test_what_makes_no_sense(self, tokenizer):
        for wrong in ({"limit": 0}, {"batch_size": 0}, {"longest": True}, {"num_fewshot": -1}, {"metric": "f1"}):
            with pytest.raises(DataError, match="takes"):
                lm_eval_batches(Task(questions()), tokenizer, **wrong)
        with pytest.raises(DataError, match="takes no examples"):
            lm_eval_batches(Task(questions(), examples=0), tokenizer, num_fewshot=2)
        with pytest.raises(DataError, match="both need one at least"):
            lm_eval_batches(Task([{"question": "a", "choices": ["", "b"], "gold": 0}]), _NoBlanks(tokenizer))
        with pytest.raises(ModelError, match="gives logits"):
            Choices(_Last())(torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.int64))

    @pytest.mark.skipif(LIBRARY, reason="lm-eval is installed")
    def test_names_without_the_library(self, tokenizer):
        with pytest.raises(DataError, match=r"pip install 'flipproof\[lm-eval\]'"):
            lm_eval_batches("arc_easy", tokenizer)


class _NoBlanks:
    """A tokenizer that makes nothing of a blank at the end."""

    bos_token_id = eos_token_id = None

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def encode(self, text: str, **more: Any) -> list[int]:
        return list(self.inner.encode(text.rstrip(), **more))


class _Last(torch.nn.Module):
    """Scores behind the last token alone."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(tokens), 5)


def test_the_request_asks_for_examples_as_the_evaluator_does(tokenizer):
    for own, asked, given in ((None, None, 0), (3, None, 3), (None, 2, 2), (3, 2, 2)):
        task = Task(questions(3), examples=own)
        assert len(lm_eval_batches(task, tokenizer, num_fewshot=asked, limit=2)[0][1]) == 2
        assert task.settings["num_fewshot"] == given
        assert task.seed == 1234


@pytest.mark.skipif(not LIBRARY, reason="lm-eval is not installed (flipproof[lm-eval])")
@pytest.mark.filterwarnings("default")
class TestAgainstTheLibrary:
    @pytest.fixture
    def make(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        from lm_eval.api.task import ConfigurableTask

        (tmp_path / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions(23)))
        metrics = ("acc", "acc_norm", "acc_bytes")
        config = {
            "task": "asked",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "asked.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in metrics],
        }
        return lambda **more: ConfigurableTask(config=copy.deepcopy({**config, **more}))

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"num_fewshot": 2, "fewshot_split": "test"},
            {"doc_to_text": ""},  # no context
            {"doc_to_text": "{{question}}  ", "target_delimiter": ""},  # blanks at its end
            {"doc_to_text": "<|end|>{{question}}"},  # begins as texts do
            {"doc_to_choice": ["A", "B", "C"]},  # read once
        ],
    )
    def test_log_likelihoods_and_metrics(self, make, network, tokenizer, more):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=4)
        theirs = lm_eval.simple_evaluate(model=model, tasks=[make(**more)], log_samples=True, bootstrap_iters=0)
        samples = sorted(theirs["samples"]["asked"], key=lambda one: one["doc_id"])
        for metric in ("acc", "acc_norm", "acc_bytes"):
            data = lm_eval_batches(make(**more), tokenizer, metric=metric, longest=48)
            targets = torch.cat([targets for _, targets in data])
            found = scores(network, data)
            assert (
                float((found.argmax(dim=1) == targets).double().mean()) == theirs["results"]["asked"][f"{metric},none"]
            )
            assert targets.tolist() == [int(one["target"]) for one in samples]
            if metric == "acc":
                for row, one in zip(found.tolist(), samples, strict=True):
                    expected = [likelihood for likelihood, _ in one["filtered_resps"]]
                    assert row[: len(expected)] == pytest.approx(expected, abs=3e-5)

    def test_names(self, tokenizer):
        with pytest.raises(DataError, match="knows no task 'no_such'"):
            lm_eval_batches("no_such", tokenizer)
        with pytest.raises(DataError, match="'mmlu' is several tasks"):
            lm_eval_batches("mmlu", tokenizer)
