"""How the library is built: imports go backwards, lines and signatures are short, only core knows the environment.

    python tests/test_layout.py      the modules in order, each with what it imports"""
import ast, re, sys
from pathlib import Path

if __name__ == '__main__': sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pytest

from conftest import NOTEBOOKS, ROOT
from run import folder_of

LIBRARY = ROOT/'pcam_tp'
ORDER = 'foundation', '', 'tools'   # of imports: what the course stands on, the course, what stands on the course
WIDEST, MOST = 120, 8   # characters in a line, parameters of a public function
EXPLAINERS = set()   # public explainers that `@explainer` does not make


def module(path):
    "The module that a notebook exports, or None."
    found = re.search(r'#\|\s*default_exp (\w+)', path.read_text(encoding='utf-8'))
    return found and found[1]


def modules():
    "The modules in the order in which they may import, by folder and number of their notebooks."
    names = sorted(NOTEBOOKS, key=lambda n: (ORDER.index(folder_of(n)), n))
    return [m for n in names if (m := module(NOTEBOOKS[n]))]


MODULES = modules()
SOURCES = {p.stem: p for p in sorted(LIBRARY.glob('*.py')) if not p.stem.startswith('_')}
each_module = pytest.mark.parametrize('name', SOURCES)


def tree(name): return ast.parse(SOURCES[name].read_text(encoding='utf-8'))


def imports(name):
    "Names of the library's modules that a module imports, anywhere in it; in the order of the modules."
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import): parts = [a.name.split('.') for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (['pcam_tp'] if node.level else []) + (node.module or '').split('.')
            parts = [[*filter(None, base), a.name] for a in node.names]
        else: continue
        found |= {p[1] for p in parts if p[0] == 'pcam_tp' and len(p) > 1 and p[1] in SOURCES}
    return sorted(found, key=MODULES.index)


def test_every_module_has_its_notebook():
    assert sorted(MODULES) == sorted(SOURCES) and len(MODULES) > 1
    assert {folder_of(n) for n in NOTEBOOKS} == set(ORDER)


@each_module
def test_imports_go_backwards(name):
    later = MODULES[MODULES.index(name):]
    forwards = [m for m in imports(name) if m in later]
    assert not forwards, f'{name} imports {", ".join(forwards)}, which come later in {" → ".join(MODULES)}'


@each_module
def test_lines_are_short(name):
    lines = SOURCES[name].read_text(encoding='utf-8').splitlines()
    long = {i: len(l) for i, l in enumerate(lines, 1) if len(l) > WIDEST and not l.startswith('__all__')}   # nbdev's own
    assert not long, f'lines of {name}.py with more than {WIDEST} characters: {long}'


def functions(node, name):
    "(dotted name, definition) of the public functions and methods; `__init__` is the class's own call."
    for f in node.body:
        if isinstance(f, ast.ClassDef) and not f.name.startswith('_'): yield from functions(f, f'{name}.{f.name}')
        public = isinstance(f, ast.FunctionDef) and (not f.name.startswith('_') or f.name == '__init__')
        if public: yield f'{name}.{f.name}', f


def explains(f):
    "Is the function made by `@explainer`?"
    return any(re.match(r'explainer\b', ast.unparse(d)) for d in f.decorator_list)


@each_module
def test_signatures_are_short(name):
    long = {}
    for full, f in functions(tree(name), name):
        a = f.args
        n = sum(p.arg not in ('self', 'cls') for p in (*a.posonlyargs, *a.args, *a.kwonlyargs))
        if n > MOST and not explains(f) and full not in EXPLAINERS: long[full] = n
    assert not long, f'public functions with more than {MOST} parameters: {long}'


@each_module
def test_only_core_reads_the_environment(name):
    "Nobody writes it: configuration is passed, and its defaults come from core."
    reads = lambda n: ast.unparse(n) in ('os.environ', 'os.getenv', 'os.environb')
    writing = re.compile(r'os\.(putenv|unsetenv)|os\.environ\.(update|setdefault|pop|popitem|clear)\b|patch\.dict\(os\.environ')
    found = {}
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.Attribute, ast.Call)) and writing.match(ast.unparse(node)): found[node.lineno] = 'writes'
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and reads(node.value): found[node.lineno] = 'writes'
        if isinstance(node, ast.ImportFrom) and node.module == 'os' and {'environ', 'getenv'} & {a.name for a in node.names}:
            found[node.lineno] = 'imports a part of'
        if isinstance(node, ast.Attribute) and reads(node) and name != 'core': found.setdefault(node.lineno, 'reads')
    assert not found, f'{name}.py, by line: {found} os.environ'


if __name__ == '__main__':
    width = max(map(len, MODULES))
    for m in MODULES: print(f'{m:{width}}  ' + ' '.join(imports(m)))
