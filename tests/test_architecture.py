"""Import directions, fences around third parties, and constructs that must not appear.

Every detector is a function from source text to findings, so that each is also shown a text which
it has to flag.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tutelage"
FILES = sorted(SOURCE.rglob("*.py"))


@lru_cache(maxsize=1)  # of a file that all detectors look at in turn
def nodes(source: str) -> list[ast.AST]:
    """Of a text, the module first."""
    return list(ast.walk(ast.parse(source)))


_ORDER = (
    *("core", "grading", "data", "envs", "models", "rollout", "teachers", "setup", "memory"),
    *("evaluation", "train"),
)
"""Rooms of which each may import those before it."""
MAY_IMPORT = {
    "errors": (),
    "files": ("files", "errors"),
    "config": ("config", "errors"),
    "core": ("core",),
    "integrations": ("integrations", "core"),
    "grading": ("grading", "errors"),
    **{
        room: (*_ORDER[: place + 1], "files", "config", "errors", *([""] if place >= 7 else []))
        for place, room in enumerate(_ORDER)
        if place >= 2
    },
    "report": ("report", "evaluation.metrics", "files", "errors"),
    "commands": ("commands", *_ORDER, "report", "files", "config", "errors", ""),
    "cli": ("commands", *_ORDER, "report", "config", "errors", ""),
    "__init__": ("core", "errors"),
    "__main__": ("cli",),
}
"""Parts of the package that each part may import; "" is the package itself."""

FENCES = {
    "triton": ("core/kernels/", "rollout/cuda/"),
    "torch": (
        *("core/", "data/batch.py", "models/", "rollout/", "teachers/", "setup/", "memory/"),
        *("evaluation/measure.py", "train/", "commands/", "integrations/"),
    ),
    "transformers": ("models/", "rollout/", "memory/"),
    "tokenizers": ("models/",),
    "gguf": ("models/",),
    "numpy": ("models/gguf.py",),
    "peft": ("models/lora.py",),
    "bitsandbytes": ("models/optimizer.py",),
    "liger_kernel": ("models/liger.py",),
    "safetensors": ("models/", "rollout/", "teachers/", "train/", "commands/"),
    "accelerate": ("setup/", "train/", "integrations/trl.py"),
    "trl": ("integrations/trl.py",),
    "verl": ("integrations/verl.py",),
    "datasets": ("data/formats.py",),
    "huggingface_hub": ("data/hub.py", "data/formats.py", "commands/push.py"),
    "pyarrow": ("data/formats.py",),
    "vllm": ("rollout/vllm_engine.py", "rollout/nccl_transfer.py"),
    "math_verify": ("grading/_worker.py",),
    "latex2sympy2_extended": ("grading/_worker.py",),
    "antlr4": ("grading/_worker.py",),
    "sympy": ("grading/_worker.py",),
    "matplotlib": ("report/",),
    "jinja2": ("report/", "models/chat/"),
    "verifiers": ("envs/verifiers_worker.py",),
    "renderers": ("envs/verifiers_worker.py",),
    "httpx2": ("rollout/http_client.py",),
    "anyio": ("rollout/http_client.py",),
    "pydantic": (
        "config/",
        "setup/",
        "report/",
        "evaluation/server.py",
        "rollout/",
        "teachers/",
        "envs/",
    ),
    "yaml": ("config/read.py",),
    "rich": ("commands/progress.py", "commands/demo.py", "cli.py"),
    "argcomplete": ("commands/completion.py",),
}
"""Where each third party may be imported; one that is not listed may be nowhere."""

# --- detectors ------------------------------------------------------------------------------------


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, in_types: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported module, absolute, and whether only a type checker sees the import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, in_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), in_types
        elif isinstance(node, ast.If) and is_for_types(node):
            for child in node.body:
                yield from imports(ast.Module([child], []), True)
            yield from imports(ast.Module(node.orelse, []), in_types)
        else:
            yield from imports(node, in_types)


def wrong_directions(source: str, place: str) -> list[str]:
    """Imports of our own that point against the arrows."""
    part = place.split("/")[0].removesuffix(".py")
    found = []
    for name, _ in imports(nodes(source)[0]):
        top, _, inner = name.partition(".")
        is_allowed = any(
            inner == a or (a and inner.startswith(f"{a}.")) for a in MAY_IMPORT.get(part, ())
        )
        if (top == "tutelage" and not is_allowed) or name.startswith("."):
            found.append(f"{place} imports {name}")
    return found


def broken_fences(source: str, place: str) -> list[str]:
    """Third parties imported where they do not belong; types may be named anywhere but in core."""
    found = []
    for name, in_types in imports(nodes(source)[0]):
        top = name.split(".")[0]
        if top in ("tutelage", "") or top in sys.stdlib_module_names:
            continue
        if in_types and top in FENCES and not place.startswith("core/"):
            continue
        if not place.startswith(FENCES.get(top, ())):
            found.append(f"{place} imports {top}")
    return found


def line(node: ast.AST) -> int:
    return node.lineno if isinstance(node, ast.expr | ast.stmt | ast.excepthandler) else 0


FORBIDDEN_NAMES = ("eval", "exec", "compile", "__import__")
FORBIDDEN_MODULES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
FORBIDDEN_PATHS = ("torch.load", "yaml.load", "os.system", "os.popen", "importlib.import_module")
FORBIDDEN_ENDINGS = (".nan_to_num", ".nan_to_num_", ".extractall")
FORBIDDEN_OPTIONS = ("shell=True", "trust_remote_code=True", "weights_only=False")


def dangers(source: str, place: str) -> list[str]:
    """Calls and options that run what a file or a model says, or hide what is not a number."""
    found = []
    for node in nodes(source):
        text = ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            text = node.func.id if node.func.id in FORBIDDEN_NAMES else ""
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in FORBIDDEN_PATHS or name.endswith(FORBIDDEN_ENDINGS):
                text = name
        elif isinstance(node, ast.keyword):
            text = next((o for o in FORBIDDEN_OPTIONS if ast.unparse(node) == o), "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            text = forbidden_import(node)
        if text:
            found.append(f"{place}:{line(node)} {text}")
    return found


def forbidden_import(node: ast.Import | ast.ImportFrom) -> str:
    if isinstance(node, ast.Import):
        return next((a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES), "")
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    is_module = (node.module or "").split(".")[0] in FORBIDDEN_MODULES
    endings = (*FORBIDDEN_PATHS, "torch.nan_to_num")
    return next((name for name in names if is_module or name in endings), "")


BROAD = {"Exception", "BaseException"}
FOREIGN_CODE = ("envs/guard.py", "envs/verifiers_worker.py")
"""Where code that is not ours runs and may raise anything."""


def broad_handlers(source: str, place: str) -> list[str]:
    """`except` without a type, or with one that catches everything, also by a named tuple."""
    if place in FOREIGN_CODE:
        return []
    tree = nodes(source)[0]
    named = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and names_in(node.value) & BROAD
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            is_broad = node.type is None or bool(names_in(node.type) & (BROAD | named))
            is_broad = is_broad and not explains(node)
        else:
            is_broad = (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith("suppress")
                and any(names_in(argument) & (BROAD | named) for argument in node.args)
            )
        if is_broad:
            found.append(f"{place}:{line(node)}")
    return found


def explains(handler: ast.ExceptHandler) -> bool:
    """Whether `except Exception` (which lets Ctrl-C pass) always ends in another error."""
    is_exception = handler.type is not None and ast.unparse(handler.type) == "Exception"
    last = handler.body[-1]
    return is_exception and isinstance(last, ast.Raise) and last.cause is not None


def names_in(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def asserts(source: str, place: str) -> list[str]:
    """Assertions, which vanish under -O, other than `assert isinstance(...)` for a type checker."""
    return [
        f"{place}:{node.lineno}"
        for node in nodes(source)
        if isinstance(node, ast.Assert) and not ast.unparse(node.test).startswith("isinstance(")
    ]


def private_torch(source: str, place: str) -> list[str]:
    """Private names of torch, and its operators without their public functions."""
    tree = nodes(source)[0]
    names: dict[str, str] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for local, name in torch_names(node):
                names[local] = "torch" if local == "torch" else name
                found += [f"{place}:{line(node)} {name}"] if is_private(name) else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            name = f"{names.get(root, '')}.{rest}"
            if root in names and is_private(name):
                found.append(f"{place}:{line(node)} {name}")
    return [] if place.startswith("models/llama_cpu/") else found


def torch_names(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Local names that an import binds to torch or a part of it, and what they stand for."""
    for alias in node.names:
        start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        name = f"{start}{alias.name}"
        if name.split(".")[0] == "torch":
            yield alias.asname or (alias.name if start else "torch"), name


DOCUMENTED = ("torch.utils._python_dispatch.TorchDispatchMode",)
"""Names with an underscore that torch's manual tells users to import ("Extending PyTorch")."""


def is_private(name: str) -> bool:
    """Whether a name of torch is private, or below `torch.ops`."""
    parts = name.split(".")
    if name in DOCUMENTED:
        return False
    return parts[:2] == ["torch", "ops"] or any(
        part.startswith("_") and not part.endswith("__") for part in parts
    )


def class_swaps(source: str, place: str) -> list[str]:
    """Objects that are given another class."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            is_swap = node.attr == "__class__"
        else:
            is_swap = (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith(("setattr", "__setattr__"))
                and any(ast.unparse(argument) == "'__class__'" for argument in node.args)
            )
        if is_swap:
            found.append(f"{place}:{line(node)}")
    return [] if place.startswith("models/llama_cpu/") else found


def fallbacks(source: str, place: str) -> list[str]:
    """`getattr` with a default: a misspelt name would go unseen."""
    return [
        f"{place}:{node.lineno}"
        for node in nodes(source)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and len(node.args) + len(node.keywords) > 2
    ]


def lengths(source: str) -> dict[str, int]:
    """Lines of every function from its `def` on, without its docstring."""
    sizes = {}
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            text = node.body[0]
            if ast.get_docstring(node) is not None:
                size -= (text.end_lineno or text.lineno) - text.lineno + 1
            sizes[f"{node.name}:{node.lineno}"] = size
    return sizes


def too_long(source: str, place: str) -> list[str]:
    """Files over 400 lines and functions over 60, kernels (one argument a line) over 150."""
    limit = 150 if place in ("core/kernels/rows.py", "core/kernels/more_rows.py") else 60
    num_lines = len(source.splitlines())
    found = [f"{place} has {num_lines} lines"] if num_lines > 400 else []
    return found + [f"{place} {name} has {n}" for name, n in lengths(source).items() if n > limit]


# --- the package ----------------------------------------------------------------------------------

Detector = Callable[[str, str], list[str]]
DETECTORS: tuple[Detector, ...] = (
    wrong_directions,
    broken_fences,
    dangers,
    broad_handlers,
    asserts,
    fallbacks,
    private_torch,
    class_swaps,
    too_long,
)


def test_the_package_is_clean() -> None:
    assert len(FILES) > 30
    found = []
    for path in FILES:
        place, source = path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8")
        for detector in DETECTORS:
            found += [(detector.__name__, line) for line in detector(source, place)]
    assert found == []


def test_every_part_of_the_package_has_its_arrows() -> None:
    parts = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    assert parts <= MAY_IMPORT.keys()


ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_may_import(room: str) -> None:
    text = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text("utf-8"))) or ""
    named = set(re.findall(r"`([\w.]+)`", text.partition("May import ")[2]))
    assert named == {part or "tutelage" for part in MAY_IMPORT[room]} - {room}


def test_the_picture_shows_every_room_above_what_it_may_import() -> None:
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    found = re.findall(r'<g id="(\w+)" data-layer="(\d+)"', picture)
    layers = {room: int(layer) for room, layer in found}
    assert set(layers) == {*ROOMS, "cli", "errors"}
    for room, layer in layers.items():
        below = {part.split(".")[0] for part in MAY_IMPORT[room]} - {room, ""}
        assert all(layers[part] < layer for part in below), room


def test_no_test_file_is_too_long() -> None:
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "reliability").rglob("*.py")]
    assert len(files) > 100
    assert [path.name for path in files if len(path.read_text("utf-8").splitlines()) > 500] == []


def test_functions_are_short() -> None:
    sizes = [n for path in FILES for n in lengths(path.read_text(encoding="utf-8")).values()]
    assert median(sizes) <= 12


# --- negative controls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detector", "place", "source"),
    [
        (wrong_directions, "core/stats.py", "from tutelage.data.types import Prompt"),
        (wrong_directions, "core/stats.py", "from tutelage.errors import DataError"),
        (wrong_directions, "models/load.py", "def f():\n    import tutelage.train.loop"),
        (wrong_directions, "report/plots.py", "from tutelage.core import entropy"),
        (wrong_directions, "report/plots.py", "from tutelage.evaluation.evaluate import x"),
        (wrong_directions, "data/batch.py", "from tutelage import LazyLogits"),
        (wrong_directions, "data/batch.py", "from ..models import load"),
        (wrong_directions, "data/batch.py", "from tutelage.corex import y"),
        (
            wrong_directions,
            "evaluation/x.py",
            "if TYPE_CHECKING:\n    from tutelage.train import x",
        ),
        (wrong_directions, "new/x.py", "from tutelage.core import entropy"),
        (broken_fences, "train/loop.py", "from transformers import AutoModel"),
        (broken_fences, "train/loop.py", "def f():\n    from transformers.utils import logging"),
        (broken_fences, "models/load.py", "import accelerate.utils"),
        (broken_fences, "evaluation/measure.py", "try:\n    import matplotlib\nexcept OSError: 0"),
        (broken_fences, "data/batch.py", "import datasets"),
        (broken_fences, "core/stats.py", "import numpy as np"),
        (broken_fences, "integrations/verl.py", "import trl"),
        (wrong_directions, "integrations/trl.py", "from tutelage.models.head import head"),
        (broken_fences, "core/stats.py", "if TYPE_CHECKING:\n    import transformers"),
        (broken_fences, "report/records.py", "import torch"),
        (
            broken_fences,
            "train/x.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import transformers",
        ),
        (dangers, "x.py", "eval(text)"),
        (dangers, "x.py", "exec(text)"),
        (dangers, "x.py", "compile(text, '', 'exec')"),
        (dangers, "x.py", "__import__(name)"),
        (dangers, "x.py", "import pickle"),
        (dangers, "x.py", "from pickle import loads"),
        (dangers, "x.py", "torch.load(path)"),
        (dangers, "x.py", "from torch import load"),
        (dangers, "x.py", "yaml.load(text)"),
        (dangers, "x.py", "os.system('ls')"),
        (dangers, "x.py", "subprocess.run(command, shell=True)"),
        (dangers, "x.py", "load(trust_remote_code=True)"),
        (dangers, "x.py", "torch.nan_to_num(loss)"),
        (dangers, "x.py", "loss.nan_to_num_()"),
        (dangers, "x.py", "from torch import nan_to_num"),
        (dangers, "x.py", "archive.extractall(path)"),
        (broad_handlers, "x.py", "try:\n    f()\nexcept:\n    pass"),
        (broad_handlers, "x.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (broad_handlers, "x.py", "try:\n    f()\nexcept Exception as e:\n    raise e"),
        (broad_handlers, "x.py", "try:\n    f()\nexcept BaseException as e:\n    raise E from e"),
        (broad_handlers, "x.py", "try:\n    f()\nexcept (OSError, BaseException):\n    pass"),
        (broad_handlers, "x.py", "ALL = (OSError, Exception)\ntry:\n    f()\nexcept ALL:\n    0"),
        (broad_handlers, "x.py", "with contextlib.suppress(Exception):\n    f()"),
        (asserts, "x.py", "assert keep > 0"),
        (fallbacks, "x.py", "getattr(config, 'softcap', None)"),
        (private_torch, "x.py", "import torch\ntorch._C._has_mkldnn"),
        (private_torch, "x.py", "import torch\ntorch.ops.mkldnn.linear"),
        (private_torch, "x.py", "import torch as t\nt.ops.aten._softmax(x)"),
        (private_torch, "x.py", "import torch.nn\ntorch._foreach_copy_(a, b)"),
        (private_torch, "x.py", "from torch import ops\nops.mkldnn.linear"),
        (private_torch, "x.py", "from torch.autograd import forward_ad\nforward_ad._current_level"),
        (private_torch, "x.py", "def f():\n    from torch._dynamo import reset"),
        (private_torch, "x.py", "import torch._inductor"),
        (class_swaps, "x.py", "layer.__class__ = Linear"),
        (class_swaps, "x.py", "a.b, c[0].__class__ = 1, Linear"),
        (class_swaps, "x.py", "setattr(layer, '__class__', Linear)"),
        (class_swaps, "x.py", "object.__setattr__(layer, '__class__', Linear)"),
        (too_long, "x.py", "x = 1\n" * 401),
        (too_long, "x.py", "def f():\n" + "    x = 1\n" * 60),
        (too_long, "core/kernels/rows.py", "def f():\n" + "    x = 1\n" * 150),
    ],
)
def test_each_detector_can_fail(detector: Detector, place: str, source: str) -> None:
    assert detector(source, place)


@pytest.mark.parametrize(
    ("detector", "place", "source"),
    [
        (wrong_directions, "train/loop.py", "from tutelage.models.load import save_model"),
        (wrong_directions, "cli.py", "from tutelage import __version__"),
        (broken_fences, "train/loop.py", "if TYPE_CHECKING:\n    from transformers import X"),
        (broken_fences, "models/load.py", "def f():\n    from transformers import X"),
        (dangers, "x.py", "re.compile('a'); model.eval(); json.load(file); load_file(path)"),
        (broad_handlers, "x.py", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
        (broad_handlers, "x.py", "try:\n    f()\nexcept Exception as e:\n    raise E() from e"),
        (asserts, "x.py", "assert isinstance(stats, TokenStats)"),
        (fallbacks, "x.py", "getattr(config, name)"),
        (private_torch, "x.py", "import torch\ntorch.__version__\nmodel._private(torch.nn.Linear)"),
        (private_torch, "models/llama_cpu/x.py", "import torch\ntorch._C._has_mkldnn"),
        (class_swaps, "x.py", "kind = layer.__class__"),
        (class_swaps, "models/llama_cpu/x.py", "layer.__class__ = Linear"),
        (too_long, "x.py", "def f():\n" + "    x = 1\n" * 59),
        (too_long, "core/kernels/rows.py", "def f():\n" + "    x = 1\n" * 149),
        (too_long, "x.py", "def f():\n    '''a\n\n\n\n    b'''\n" + "    x = 1\n" * 59),
    ],
)
def test_no_detector_flags_what_is_fine(detector: Detector, place: str, source: str) -> None:
    assert detector(source, place) == []
