"""From the text on a command line to a subject: every way in, and a clear sentence for every wrong turn."""

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .casts import cast
from .errors import SubjectError
from .first_run import from_model
from .load import SubjectCodeError, candidates, load_attribute
from .settle import settled
from .subject import Subject

DEFAULT = "olmo1-4M"

FORMS = (
    "a preset (olmo1-4M), file.py:attribute, package.module:attribute, a local Hugging Face checkpoint folder, "
    "transformers:ClassName, or hf:org/name"
)

# Above this many parameters a preset or a transformers class is checked on a small copy of the same configuration:
# rules such as causality do not depend on sizes, and float64 on two cores does.
SHRINK_ABOVE = 40_000_000
CONFIG_ARGUMENT = re.compile(r"(^|_)(config|cfg|conf|args|params|hparams)$")
CONFIG_CLASS = re.compile(r"_?(Config|ModelArgs|ModelConfig|Args|Arguments|HParams|Hyperparameters|Params)$")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything needed to build the subject again in another process; JSON-able."""

    spec: str = DEFAULT
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    tokenizer: str | None = None
    adapter: str | None = None
    vocab_size: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    download: bool = False
    meta: bool = False  # build on the meta device, whole: nothing is allocated
    whole: bool = False  # no small copy of a large preset


def bare_model(job: Job) -> tuple[nn.Module, object]:
    """(model, config) on the meta device where the subject's own code can be built there, without a first run."""
    built = _on_meta(dataclasses.replace(job, meta=True))
    return built.model, built.config


def resolve(job: Job) -> Subject:
    """The subject that a job names. SubjectError when the spec leads nowhere (exit 2); SubjectCodeError when the
    subject's own code raises, or gives back no model (a finding)."""
    adapter = load_attribute(job.adapter) if job.adapter else None
    if adapter is not None and not callable(adapter):
        raise SubjectError(f"--adapter {job.adapter} is no function")
    if job.tokenizer and not Path(job.tokenizer).exists():
        raise SubjectError(f"no such tokenizer file: {job.tokenizer}")
    built = _on_meta(job) if job.meta else _build(job)
    if not job.meta:
        if any(t.is_meta for t in built.model.parameters()):
            raise SubjectError(f"{job.spec} builds a model whose weights are on the meta device: they hold no numbers; build it on the CPU")
        cast(built.model, _dtype(job.dtype), device=device_named(job.device))
    subject = from_model(
        built.model,
        spec=job.spec,
        config=built.config,
        adapter=adapter,
        tokenizer=job.tokenizer,
        vocab_size=job.vocab_size,
        seed=job.seed,
        rebuild=lambda: resolve(job),
    )
    subject.remake = lambda seed: _build(dataclasses.replace(job, seed=seed)).model
    subject.assumptions[:0] = built.assumptions
    return subject


def resolve_object(value: object, job: Job) -> Subject:
    """The subject around a model, a class or a factory that Python holds already; `job` gives it its name and its seed."""

    def build(seed: int) -> _Built:
        with settled(seed=seed):
            return _from_object(value, dataclasses.replace(job, seed=seed))

    built = build(job.seed)
    subject = from_model(built.model, spec=job.spec, config=built.config, vocab_size=job.vocab_size, seed=job.seed)
    if not isinstance(value, nn.Module):
        subject.rebuild = lambda: resolve_object(value, job)
        subject.remake = lambda seed: build(seed).model
    return subject


@dataclasses.dataclass(slots=True, kw_only=True)
class _Built:
    model: nn.Module
    config: object = None
    assumptions: list[str] = dataclasses.field(default_factory=list)


def _on_meta(job: Job) -> _Built:
    """The subject built without memory; one whose own code cannot be built so is built as usual."""
    try:
        with torch.device("meta"):
            return _build(job)
    except SubjectCodeError:
        return _build(job)


def device_named(name: str) -> torch.device:
    """SubjectError when this machine has no such device: never a silent run on another one."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SubjectError(f"--device {name}: no such kind of device; try cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise SubjectError(f"--device {name}: CUDA is not available here (torch {torch.__version__} is {built}); use --device cpu")
    return device


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SubjectError(f"--dtype {name}: expected float32, float64, bfloat16 or float16")
    return dtype


def _build(job: Job) -> _Built:
    spec = job.spec
    with settled(seed=job.seed):
        if spec.startswith("transformers:"):
            return _from_transformers(spec.partition(":")[2], job)
        if spec.startswith("hf:"):
            return _from_checkpoint(spec.partition(":")[2], job, local_files_only=not job.download)
        if ":" in spec:
            return _from_object(load_attribute(spec), job)
        path = Path(spec)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise SubjectError(f"{spec} is a folder without config.json, so no Hugging Face checkpoint")
            return _from_checkpoint(spec, job, local_files_only=True)
        if spec.endswith(".py"):
            names = candidates(path)
            if not path.is_file():
                raise SubjectError(f"no such file: {spec}")
            hint = f"; it defines {', '.join(names[:8])}" if names else ""
            raise SubjectError(f"{spec} needs an attribute: {spec}:NAME{hint}")
        return _from_preset(spec, job)


def _from_preset(name: str, job: Job) -> _Built:
    from .model import Olmo
    from .presets import preset

    try:
        config = preset(name)
    except ValueError as error:
        beside = f"{name}.py:NAME, for {name}.py is here" if Path(f"{name}.py").is_file() else None
        raise SubjectError(f"{name!r} is no subject: expected {FORMS}; {f'perhaps {beside}' if beside else error}") from None
    known = {item.name for item in dataclasses.fields(config)}
    for key in job.config:
        if key not in known:
            raise SubjectError(f"--config {key}: OlmoConfig has no such field; it has {', '.join(sorted(known))}")
    try:
        config = _changed(config, job.config)
        with torch.device("meta"):
            full = Olmo(config)
    except (ValueError, TypeError) as error:
        raise SubjectError(f"--config does not fit {name}: {error}") from None
    parameters = sum(p.numel() for p in full.parameters())
    if job.meta:
        return _Built(model=full, config=config)
    if job.whole or parameters <= SHRINK_ABOVE:
        return _Built(model=Olmo(config), config=config)
    group = max(1, config.num_attention_heads // config.num_key_value_heads)
    heads = 4 if group in (1, 2, 4) else 2 * group
    small: dict[str, Any] = {
        "num_hidden_layers": (layers := min(config.num_hidden_layers, 4)),
        "layer_types": config.layer_types[:layers] if config.layer_types else config.layer_types,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "hidden_size": heads * 16,
        "intermediate_size": heads * 44,
        "sliding_window": min(config.sliding_window, 6) if config.sliding_window else None,
    }
    note = f"checked on a small copy ({layers} layers, hidden {heads * 16}) of {name}, which has {parameters:,} parameters"
    return _Built(model=Olmo(dataclasses.replace(config, **small)), config=config, assumptions=[note])


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The preset's config with these fields changed; fields that follow from a changed one are derived anew."""
    values = config.to_dict()
    if "num_hidden_layers" in changes and len(set(config.layer_types)) == 1:
        values["layer_types"] = None
    if "num_attention_heads" in changes and config.num_key_value_heads == config.num_attention_heads:
        values["num_key_value_heads"] = None
    return type(config).from_dict({**values, **changes})


def _from_transformers(name: str, job: Job) -> _Built:
    from .tiny import build_tiny

    try:
        model, config = build_tiny(name, seed=job.seed, **job.config)
    except ValueError as error:
        raise SubjectError(str(error)) from None
    except ImportError as error:
        raise SubjectError(f"transformers:{name} needs a package that is not installed: {error}") from None
    except Exception as error:
        if job.config:
            raise SubjectError(f"transformers:{name} does not build with this --config: {error}") from error
        raise SubjectCodeError("build") from error
    return _Built(model=model, config=config, assumptions=[f"tiny random weights from {type(config).__name__} (seed {job.seed})"])


def _from_checkpoint(name: str, job: Job, *, local_files_only: bool) -> _Built:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local_files_only)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=local_files_only, dtype=torch.float32)
    except Exception as error:  # whatever transformers, safetensors and torch raise over a file that is no good
        reason = str(error).strip().partition("\n")[0]
        hint = "; --download allows the network" if local_files_only and not Path(name).is_dir() else ""
        raise SubjectError(f"cannot load the checkpoint {name}: {reason}{hint}") from None
    return _Built(model=model.eval(), config=config)


def _from_object(value: object, job: Job) -> _Built:
    if isinstance(value, nn.Module):
        if job.config:
            raise SubjectError(f"{job.spec} is a finished model; --config has nothing to fill")
        return _Built(model=value)
    if not callable(value):
        raise SubjectError(f"{job.spec} is a {type(value).__name__}; expected a model, a class, or a function that returns a model")
    built = _call(value, job)
    config = None
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module):
        built, config = built
    if isinstance(built, type) and issubclass(built, nn.Module):
        built = _call(built, job)
    if not isinstance(built, nn.Module):
        error = TypeError(f"{job.spec} returned {_described(built)}; expected an nn.Module or (nn.Module, config)")
        raise SubjectCodeError("build") from error
    return _Built(model=built, config=config)


def _call(build: Callable[..., Any], job: Job) -> Any:
    """Call a factory or class with what `--config` gives; a transformers class gets its own tiny config."""
    config_class = getattr(build, "config_class", None)
    if isinstance(build, type) and config_class is not None:
        from .tiny import tiny_config

        try:
            return build(tiny_config(config_class, **job.config))
        except ValueError as error:
            raise SubjectError(f"{job.spec}: {error}") from None
    arguments = _arguments(build, job)
    try:
        return build(**arguments)
    except (AttributeError, KeyError) as error:
        if (name := _asked_in_vain(error, arguments)) is not None:
            given = ", ".join(job.config)
            raise SubjectError(f"{job.spec} asks its config for {name!r}: give it with --config {name}=value (given: {given})") from None
        raise SubjectCodeError("build") from error
    except Exception as error:
        raise SubjectCodeError("build") from error
    except SystemExit as error:
        raise SubjectCodeError("build") from RuntimeError(f"{job.spec} calls sys.exit({error.code})")


class GivenConfig(dict[str, Any]):
    """What `--config` gives, for code that reads config.name and for code that reads config["name"]."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name, name=name, obj=self) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "GivenConfig":
        return type(self)(copy.deepcopy(dict(self), memo))


def _asked_in_vain(error: AttributeError | KeyError, arguments: Mapping[str, Any]) -> str | None:
    """The name that a class looked for in a config of ours, in which nobody has put it."""
    made = [value for value in arguments.values() if isinstance(value, GivenConfig)]
    name = error.name if isinstance(error, AttributeError) else error.args[0] if error.args else None
    if not made or not isinstance(name, str) or name in made[0]:
        return None
    return name if isinstance(error, KeyError) or error.obj is made[0] else None


def _arguments(build: Callable[..., Any], job: Job) -> dict[str, Any]:
    try:
        parameters = [p for p in inspect.signature(build).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    except (TypeError, ValueError):
        parameters = []
    names = {p.name for p in parameters}
    required = [p for p in parameters if p.default is p.empty]
    given = {key: value for key, value in job.config.items() if key in names}
    missing = [p for p in required if p.name not in given]
    if len(missing) == 1 and CONFIG_ARGUMENT.search(missing[0].name):
        given = {missing[0].name: _config_value(build, missing[0], job)}
        missing = []
    elif left := set(job.config) - set(given):
        raise SubjectError(f"{job.spec} takes no argument {', '.join(sorted(left))}; it takes {', '.join(sorted(names)) or 'none'}")
    if missing:
        wanted = ", ".join(p.name for p in missing)
        raise SubjectError(
            f"{job.spec} needs arguments ({wanted}): give them with --config name=value, or name a function without arguments that builds the model"
        )
    return given


def _config_value(build: Callable[..., Any], parameter: inspect.Parameter, job: Job) -> Any:
    """The config object that a class asks for: of the annotated class where there is one, else a plain namespace."""
    kind = parameter.annotation
    if isinstance(kind, str):
        kind = getattr(inspect.getmodule(build), kind, None)
    if inspect.isclass(kind) and kind not in (dict, inspect.Parameter.empty):
        try:
            return kind(**job.config)
        except Exception as error:
            if job.config or isinstance(error, TypeError):
                raise SubjectError(f"{job.spec}: {kind.__name__} does not take this --config: {error}") from None
            raise SubjectCodeError("build") from error
    beside = _config_class(build) if kind is not dict else None
    if not job.config:
        takes = f" ({beside.__name__}: {', '.join(_takes(beside))})" if beside is not None else ""
        raise SubjectError(
            f"{job.spec} needs a config{takes}: give it with --config name=value or a JSON file, or name a function that builds the model"
        )
    if beside is None or not job.config.keys() <= set(_takes(beside)):
        return GivenConfig(job.config)
    try:
        return beside(**job.config)
    except Exception as error:
        raise SubjectError(f"{job.spec}: {beside.__name__} does not take this --config: {error}") from None


def _config_class(build: Callable[..., Any]) -> type | None:
    """The config class that stands beside a model class and is named after it (GPT, GPTConfig), or is the only one there."""
    names = vars(inspect.getmodule(build) or object())
    kinds = {name: kind for name, kind in names.items() if inspect.isclass(kind) and CONFIG_CLASS.search(name) and _takes(kind)}
    own = [kind for name, kind in kinds.items() if CONFIG_CLASS.sub("", name) == getattr(build, "__name__", None)]
    written = [kind for kind in kinds.values() if dataclasses.is_dataclass(kind)]
    return next(iter(own), None) or (written[0] if len(set(written)) == 1 else None)


def _takes(kind: type) -> list[str]:
    """The names that a class can be built with."""
    if dataclasses.is_dataclass(kind):
        return [item.name for item in dataclasses.fields(kind)]
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _described(value: object) -> str:
    return "None (is the `return` missing?)" if value is None else f"a {type(value).__name__}"
