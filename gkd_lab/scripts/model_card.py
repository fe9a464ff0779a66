"""Model card of a distilled student: what it was made of and how, and its scores with their intervals.

A card is read by strangers: it holds no path of the machine, no token and no name of its user.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gkd_lab.store.provenance import redact_secrets
from gkd_lab.tables.loss_labels import loss_label

CITATION = """\
@inproceedings{agarwal2024onpolicy,
  title = {On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},
  author = {Rishabh Agarwal and Nino Vieillard and Yongchao Zhou and Piotr Stanczyk and Sabela Ramos and
            Matthieu Geist and Olivier Bachem},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
}"""
INTERVAL_NOTE = (
    "Intervals are at 95 %, by the bootstrap over test examples: they cover the choice of examples, not the "
    "noise of training, which other seeds would show."
)
_HUB_METRICS = ("rouge", "bleu", "chrf", "accuracy")
"""Metrics that the hub knows; a name that begins so is one of them there."""
_KL_WORDS = {
    0.0: "forward KL divergence, KL(teacher ‖ student)",
    1.0: "reverse KL divergence, KL(student ‖ teacher)",
}
_PLACES = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "push_to_hub", "report_to")
"""Settings that say where a run is kept, not what it is."""
_TEXT_TOKENS = ("eos_token", "pad_token")
"""Settings that have a secret's name and are none."""


@dataclass(frozen=True)
class CardSource:
    """A model or data set that a student was made of: its name, and whether the hub has it by that name."""

    name: str
    is_on_hub: bool = False
    revision: str | None = None
    note: str = ""
    """What was done to it, as the end of a sentence."""
    kind: str = "models"

    def format_link(self) -> str:
        """Return the name as Markdown, with a link where the hub has it, and the note."""
        if not self.is_on_hub:
            return self.name + self.note
        revision = f" ({self.revision[:12]})" if self.revision and self.revision != "main" else ""
        path = self.name if self.kind == "models" else f"{self.kind}/{self.name}"
        return f"[{self.name}](https://huggingface.co/{path}){revision}{self.note}"


@dataclass(frozen=True)
class ScoreLine:
    """One score: its value (0 to 100), its 95 % interval if it has one, and over how many examples."""

    evaluation: str
    split: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    n_examples: int | None = None

    @classmethod
    def from_score(cls, evaluation: str, split: str, metric: str, score: Mapping[str, Any]) -> "ScoreLine":
        """Return the line of a stored score: `value`, and `low`, `high`, `n` if it has them."""
        return cls(
            evaluation, split, metric, score["value"], score.get("low"), score.get("high"), score.get("n")
        )


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says.

    Args:
        name: Name that loads the model, OWNER/NAME on the hub.
        student, teacher: What it was made of.
        objective: Sentences about the loss and the text that it is computed on.
        data: Sentences about the rows.
        dataset: Name of the data, and its configuration.
        scores: With `score_note`, what the intervals cover.
        settings: Option -> value, as a user could give them again.
        versions: Package -> version, seeds and the like.
        auto_class: Class of transformers that loads the model; None: that of its kind of language model.
    """

    name: str
    student: CardSource
    teacher: CardSource
    objective: Sequence[str]
    data: Sequence[str]
    dataset: CardSource
    dataset_config: str | None = None
    scores: Sequence[ScoreLine] = ()
    score_note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_title: str = "Settings"
    versions: Mapping[str, Any] = field(default_factory=dict)
    is_encoder_decoder: bool = False
    is_adapter: bool = False
    auto_class: str | None = None

    @property
    def title(self) -> str:
        """Name without owner."""
        return self.name.split("/")[-1]


def build_card(facts: CardFacts) -> ModelCard:
    """Return the card: metadata by huggingface_hub's own classes, then the text."""
    data = ModelCardData(
        base_model=facts.student.name if facts.student.is_on_hub else None,
        datasets=[facts.dataset.name] if facts.dataset.is_on_hub else None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=None if facts.is_encoder_decoder or facts.auto_class else "text-generation",
        tags=["gkd", "knowledge-distillation", "on-policy-distillation", "gkd-lab"],
        model_name=facts.title,
        eval_results=[_build_eval_result(facts, score) for score in facts.scores] or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_format_text(facts)}\n")


def _build_eval_result(facts: CardFacts, score: ScoreLine) -> EvalResult:
    """Return a score in the hub's form; its interval is among the arguments of the metric."""
    interval = {} if score.low is None else {"low": score.low, "high": score.high, "interval": "95 %"}
    count = {} if score.n_examples is None else {"examples": score.n_examples}
    metric = next((name for name in _HUB_METRICS if score.metric.startswith(name)), score.metric)
    return EvalResult(
        task_type="text-generation",
        dataset_type=facts.dataset.name if facts.dataset.is_on_hub else "local",
        dataset_name=facts.dataset.name,
        dataset_config=facts.dataset_config,
        dataset_split=score.split,
        metric_type=metric,
        metric_name=f"{score.metric} ({score.evaluation})",
        metric_value=score.value,
        metric_args={**interval, **count} or None,
    )


# ---- text ----


def _format_text(facts: CardFacts) -> str:
    """Return the card's text in Markdown."""
    sections = [
        f"# {facts.title}",
        f"Distilled by generalized knowledge distillation (GKD). Student: {facts.student.format_link()}. "
        f"Teacher: {facts.teacher.format_link()}.",
        _format_section("Objective", facts.objective),
        _format_section("Data", facts.data),
        _format_scores(facts),
        _format_section("Use", [_format_usage(facts)]),
        _format_yaml_section(facts.settings_title, facts.settings),
        _format_yaml_section("Provenance", facts.versions),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(section for section in sections if section)


def _format_section(title: str, paragraphs: Iterable[str]) -> str:
    """Return a heading with its paragraphs; empty without any."""
    text = "\n\n".join(paragraphs)
    return f"## {title}\n\n{text}" if text else ""


def _format_yaml_section(title: str, values: Mapping[str, Any]) -> str:
    """Return a heading with values as YAML; empty without any."""
    if not values:
        return ""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).strip()
    return f"## {title}\n\n```yaml\n{text}\n```"


def _format_scores(facts: CardFacts) -> str:
    """Return the table of scores with the note on their intervals; empty without scores."""
    if not facts.scores:
        return ""
    lines = [
        "| evaluation | split | metric | score | 95 % interval | examples |",
        "|---|---|---|---|---|---|",
    ]
    for score in facts.scores:
        interval = "–" if score.low is None else f"[{score.low:.2f}, {score.high:.2f}]"
        count = "–" if score.n_examples is None else score.n_examples
        lines.append(
            f"| {score.evaluation} | {score.split} | {score.metric} | {score.value:.2f} | {interval} "
            f"| {count} |"
        )
    return _format_section("Scores", filter(None, ["\n".join(lines), facts.score_note]))


def _format_usage(facts: CardFacts) -> str:
    """Return code that loads the model; NAME stands for where it is."""
    language_model = "AutoModelForSeq2SeqLM" if facts.is_encoder_decoder else "AutoModelForCausalLM"
    auto_class = facts.auto_class or language_model
    return (
        f"```python\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
        f'model = {auto_class}.from_pretrained("{facts.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")\n```'
    )


# ---- objective ----


def describe_loss(terms: Sequence[Mapping[str, Any]]) -> str:
    """Return the terms of a loss in words: `forward KL, KL(teacher || student)`, or a weighted sum."""
    if len(terms) == 1 and terms[0].get("type", "divergence") == "divergence":
        return f"The loss is {_describe_divergence(terms[0])}."
    parts = ", ".join(_describe_term(term) for term in terms)
    return f"The loss is {loss_label([_drop_empty(term) for term in terms])}: {parts}."


def _drop_empty(term: Mapping[str, Any]) -> dict[str, Any]:
    """Return a term without fields that are None or False."""
    return {name: value for name, value in term.items() if value is not None and value is not False}


def _describe_term(term: Mapping[str, Any]) -> str:
    """Return one term with its weight in words."""
    words = (
        _describe_divergence(term)
        if term.get("type", "divergence") == "divergence"
        else str(term["type"]).replace("_", " ")
    )
    return f"{term.get('weight', 1):g} times {words}"


def _describe_divergence(term: Mapping[str, Any]) -> str:
    """Return a divergence in words, with beta and temperatures."""
    beta = term.get("beta")
    if term.get("divergence", "jsd") != "jsd":
        words = "the total variation distance of teacher and student"
    elif beta in (0, 1):
        direction = _KL_WORDS[float(beta)]
        words = f"the {direction} (beta = {beta:g})"
    else:
        words = (
            f"the generalized Jensen-Shannon divergence JSD(beta) of teacher and student with beta = {beta:g}"
        )
    if term.get("rescale"):
        words += ", divided by beta (1 - beta)"
    temperatures = [f"{side} {term.get(f'{side}_temperature') or 1:g}" for side in ("teacher", "student")]
    return f"{words}, per token, at the temperatures {' and '.join(temperatures)}"


def describe_text_source(lmbda: float, temperature: float | None, other_text: str) -> str:
    """Return in words whose text a step trains on: the student's with chance lmbda, else `other_text`."""
    if lmbda == 0:
        return f"Every step trains on {other_text} (lmbda = 0: off-policy)."
    sampled = f", sampled at temperature {temperature:g}" if temperature is not None else ""
    student_text = f"text that the student has just written itself{sampled}"
    if lmbda == 1:
        return f"Every step trains on {student_text} (lmbda = 1: on-policy)."
    return (
        f"A step trains on {student_text}, with probability lmbda = {lmbda:g}, and otherwise on {other_text}."
    )


def describe_normalization(normalization: str) -> str:
    """Return in words what a loss is the mean of."""
    if normalization == "sequence":
        return "It is averaged over the tokens of a sequence, then over sequences (Eq. 2 of the paper)."
    return "It is averaged over all tokens that are trained on."


# ---- what a stranger must not see ----


def hide_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON-like values, without folders of the machine and without secrets.

    Of a path the last part is kept.
    """
    return {
        name: _hide_value(name, value)
        for name, value in settings.items()
        if name not in _PLACES and not name.startswith("hub_")
    }


def _hide_value(name: str, value: Any) -> Any:
    """Return one value without folders and secrets."""
    if isinstance(value, Mapping):
        return {str(key): _hide_value(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide_value(name, item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(getattr(value, "value", value))
    if name not in _TEXT_TOKENS:
        (text,) = (word.partition("=")[2] for word in redact_secrets([f"--{name}={text}"]))
    return shorten_path(text)


def shorten_path(text: str) -> str:
    """Return the last part of a text that is a path of this machine; any other text unchanged."""
    is_path = text.startswith(("/", "~", "./", "../")) or (text and "\n" not in text and Path(text).exists())
    return Path(text).expanduser().resolve().name or "here" if is_path else text


def describe_source(name: str, revision: str | None = None, kind: str = "models") -> CardSource:
    """Return a model's or data set's source: a name of the hub, or the last part of a local path."""
    if Path(name).expanduser().exists():
        return CardSource(shorten_path(name))
    return CardSource(name, is_on_hub=True, revision=revision, kind=kind)


def describe_versions(provenance: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Return the lines of a card's provenance: time, versions, `facts`; no command, no machine.

    `code` is the hash of the code that results depend on.
    """
    versions = {
        name: provenance[name]
        for name in ("time", "gkd_lab", "code", "commit", "python")
        if provenance.get(name)
    }
    return {**versions, **facts, "packages": dict(provenance.get("packages", {}))}
