"""The design rules as functions: each takes one module's name and source and returns its violations, `line: what is wrong`."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

# Highest layer first. A module imports from lower rows, from its own part (cli, runner, grafts, ...), and within its row as BESIDE says.
LAYERS = (
    {"cli"},
    {"serve"},
    {"deployment"},
    {"rehearsal", "checkup", "use", "joining"},
    {"runner", "beforehand", "starter", "sweep", "forgetting"},
    {"session"},
    {"reach"},  # how a run gets at its clients
    {"hosting", "coordinating"},  # rows, base and memories of one process, for the run itself or behind an engine
    {"folders", "origin", "trouble", "kept", "handover"},
    {"recipe"},
    {"engine", "evaluation", "report", "account"},
    {"transforms"},
    {"methods"},
    {"training", "aggregation", "selection"},
    {"grafts", "moe", "data"},
    {"bundle", "address", "tree", "files", "seeds", "plugins", "settings", "signals", "turns", "words", "yaml_text", "intervals"},
)
BESIDE = {
    "grafts": {"moe"},
    "training": {"selection"},
    "bundle": {"tree", "address", "files"},
    "address": {"tree"},
    "files": {"signals"},
}
# Foreign packages that only some parts may import; TYPES_ONLY names parts that may do so under `if TYPE_CHECKING:`.
OWNERS = {
    "flwr": {"engine", "transforms"},  # transforms: the cryptography of secure aggregation, on both sides
    "ray": {"engine"},
    "peft": {"grafts"},
    "transformers": {"moe", "use"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
}
TYPES_ONLY = {"flwr": {"deployment"}, "transformers": {"data", "evaluation", "account"}}
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save"}
# Parsers raise more than ValueError; these modules see to that for all others.
PARSERS = {
    "json.loads": {"fedgraft.files", "fedgraft.data.example"},
    "json.load": set(),
    "yaml.load": {"fedgraft.yaml_text"},
    "yaml.safe_load": {"fedgraft.yaml_text"},
}
PLUGIN_FOLDERS = (
    "fedgraft.methods",
    "fedgraft.moe.families",
    "fedgraft.selection.criteria",
    "fedgraft.data.datasets",
    "fedgraft.report.recorders",
)
FRAME = {"fedgraft.methods.method"}
FILE_LINES, PLUGIN_LINES, FUNCTION_LINES = 300, 150, 60
NAME_CHAIN = re.compile(r"^\s*elif .*(method|name|algorithm|model_type|family)\s*==")
POSIX_MODULES = {"fcntl", "termios", "tty", "pty", "pwd", "grp", "resource", "syslog"}
POSIX_CALLS = {
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.getuid",
    "os.geteuid",
    "os.setsid",
    "os.mkfifo",
    "os.chown",
    "signal.alarm",
}
TEXT_CALLS = {"open", "read_text", "write_text"}
NOT_TEXT = (["files"], ["os"], ["gzip"], ["webbrowser"])  # our own, which name encoding and line ends, and calls that take no encoding
UNFINISHED = re.compile(r"\b(TODO|FIXME|for now)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Import:
    """One imported dotted name; `types` when under `if TYPE_CHECKING:`, `eager` when importing the module runs it."""

    name: str
    line: int
    types: bool
    eager: bool


def module_name(path: PurePath) -> str:
    """`fedgraft/moe/load.py` -> `fedgraft.moe.load`; a package's `__init__.py` keeps that as its last part."""
    return ".".join(path.with_suffix("").parts)


def part(module: str) -> str:
    """The row entry of LAYERS a module belongs to: `fedgraft.moe.load` -> `moe`."""
    return module.split(".")[1]


def imports(module: str, source: str) -> list[Import]:
    """Everything a module imports, wherever in the file, `importlib.import_module("literal")` included."""
    return list(_imports(module, ast.parse(source), types=False, eager=True))


def _imports(module: str, node: ast.AST, *, types: bool, eager: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, types, eager) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        anchor = module.split(".")[: -node.level] if node.level else []
        base = ".".join([*anchor, *([node.module] if node.module else [])])
        yield from (Import(f"{base}.{alias.name}", node.lineno, types, eager) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}:
        names = (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
        yield from (Import(str(name), node.lineno, types, eager) for name in names)
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        for child in node.body:
            yield from _imports(module, child, types=types or test.endswith("TYPE_CHECKING"), eager=eager and "__name__" not in test)
        for child in node.orelse:
            yield from _imports(module, child, types=types, eager=eager)
        return
    inside = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _imports(module, child, types=types, eager=inside)


def layer_order(module: str, source: str) -> list[str]:
    """A module imports from its own part, from lower layers, and within its layer as BESIDE says."""
    rank = {name: row for row, names in enumerate(LAYERS) for name in names}
    here = part(module)
    if here in {"__init__", "__main__"}:
        return []
    if here not in rank:
        return [f"1: {here!r} is in no layer; add it to LAYERS"]
    found = []
    for item in imports(module, source):
        parts = item.name.split(".")
        if parts[0] != "fedgraft" or len(parts) < 2 or parts[1] == here or parts[1] == "__version__":
            continue
        there = parts[1]
        if there not in rank:
            found.append(f"{item.line}: {item.name!r} is in no layer; import the module that defines it")
        elif rank[there] < rank[here]:
            found.append(f"{item.line}: {here} imports {there}, a higher layer")
        elif rank[there] == rank[here] and there not in BESIDE.get(here, set()):
            found.append(f"{item.line}: {here} imports {there} of the same layer")
    return found


def lazy_entry(module: str, source: str) -> list[str]:
    """The package's `__init__` and `__main__` import nothing but the standard library until they are used."""
    if part(module) not in {"__init__", "__main__"}:
        return []
    eager = [item for item in imports(module, source) if item.eager and not item.types]
    return [f"{item.line}: imports {item.name} at once" for item in eager if item.name.split(".")[0] not in sys.stdlib_module_names]


def owned_imports(module: str, source: str) -> list[str]:
    """Flower, PEFT and transformers are imported by their owners only."""
    found, here = [], part(module)
    for item in imports(module, source):
        package = item.name.split(".")[0]
        allowed = OWNERS.get(package, {here}) | (TYPES_ONLY.get(package, set()) if item.types else set())
        if here not in allowed:
            found.append(f"{item.line}: {here} imports {package}; only {', '.join(sorted(OWNERS[package]))} may")
    return found


def no_pickle(module: str, source: str) -> list[str]:
    """No pickle in any dress: neither the modules, nor torch.load / torch.save, nor allow_pickle=True."""
    found = [f"{item.line}: {item.name}" for item in imports(module, source) if item.name.split(".")[0] in UNSAFE_MODULES]
    found += [f"{item.line}: {item.name}" for item in imports(module, source) if item.name in UNSAFE_CALLS]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"{node.value.lineno}: allow_pickle")
    return found


def named_errors(module: str, source: str) -> list[str]:
    """JSON and YAML are parsed where every error of a parser becomes a ValueError: files.parse_json, yaml_text, data/example.py."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    found = [f"{node.lineno}: {ast.unparse(node)}" for node in calls if module not in PARSERS.get(ast.unparse(node), {module})]
    return found + [f"{item.line}: {item.name}" for item in imports(module, source) if module not in PARSERS.get(item.name, {module})]


def file_length(module: str, source: str) -> list[str]:
    """A file has at most FILE_LINES lines, a plug-in fewer than PLUGIN_LINES."""
    lines = len(source.splitlines())
    if module.rpartition(".")[0] in PLUGIN_FOLDERS and module not in FRAME and lines >= PLUGIN_LINES:
        return [f"1: a plug-in of {lines} lines; it has to stay under {PLUGIN_LINES}"]
    return [f"1: {lines} lines; at most {FILE_LINES}"] if lines > FILE_LINES else []


def function_length(module: str, source: str) -> list[str]:
    """A function has at most FUNCTION_LINES lines, docstring included, decorators not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{node.lineno}: {node.name} has {lines} lines; at most {FUNCTION_LINES}")
    return found


def name_chains(module: str, source: str) -> list[str]:
    """No dispatch over the names of methods or families by `elif`: a name is a file of a folder."""
    return [f"{number}: {line.strip()}" for number, line in enumerate(source.splitlines(), 1) if NAME_CHAIN.search(line)]


def docstrings(module: str, source: str) -> list[str]:
    """The module, and every public class, function and method in it, has a docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["1: the module has no docstring"]
    return found + [f"{node.lineno}: {node.name} has no docstring" for node in _public(tree) if not ast.get_docstring(node)]


def _public(scope: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public definitions of a module and of its public classes; overloads, overrides and setters repeat another's docstring."""
    for node in scope.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if any(ast.unparse(decorator).endswith(("overload", "override", ".setter")) for decorator in node.decorator_list):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from _public(node)


def no_print(module: str, source: str) -> list[str]:
    """Only the command line prints."""
    if part(module) == "cli":
        return []
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{node.lineno}: print()" for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


def portable(module: str, source: str) -> list[str]:
    """Runs on Linux, macOS and Windows alike: no POSIX-only module or call, text with its encoding, lines ended alike everywhere."""
    found = [f"{item.line}: {item.name} is POSIX only" for item in imports(module, source) if item.name.split(".")[0] in POSIX_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in POSIX_CALLS:
            found.append(f"{node.lineno}: {ast.unparse(node)} is POSIX only")
        if isinstance(node, ast.Constant) and node.value in {"fork", "forkserver"}:
            found.append(f"{node.lineno}: processes are started by spawn alone")
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in _text_call(node)]
    return found


def _text_call(node: ast.Call) -> list[str]:
    """What a call of open(), path.open(), path.read_text() or path.write_text() leaves to the machine."""
    *owner, name = ast.unparse(node.func).split(".")
    if name not in TEXT_CALLS or owner[:1] in NOT_TEXT or (not owner and name != "open"):
        return []
    arguments = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
    if name == "open" and owner and arguments and not isinstance(arguments[0], str):  # something else's `open`
        return []
    modes = [value for value in arguments if isinstance(value, str) and re.fullmatch("[rwaxbt+]+", value)] if name == "open" else []
    mode = modes[0] if modes else {"write_text": "w"}.get(name, "r")
    needed = [] if "b" in mode else ["encoding", "newline"] if set(mode) & set("wax+") else ["encoding"]
    named = {keyword.arg for keyword in node.keywords}
    if len(arguments) > {"read_text": 0, "write_text": 1, "open": 2 if owner else 3}[name]:
        named.add("encoding")
    return [f"{name} without {what}" for what in needed if what not in named]


def unfinished(module: str, source: str) -> list[str]:
    """No marks of unfinished work."""
    return [f"{number}: {line.strip()}" for number, line in enumerate(source.splitlines(), 1) if UNFINISHED.search(line)]


RULES = (
    layer_order,
    lazy_entry,
    owned_imports,
    no_pickle,
    named_errors,
    file_length,
    function_length,
    name_chains,
    docstrings,
    no_print,
    portable,
    unfinished,
)
