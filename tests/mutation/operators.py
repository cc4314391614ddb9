"""Faults that people make and cosmic-ray has no operator for, as cosmic-ray operators."""

import re

import parso
from cosmic_ray.operators.operator import Example, Operator
from parso.python import tree

# A leaf takes its white space with it; what replaces it needs the same.


def _leaf(kind, old, value):
    return kind(value, old.start_pos, old.get_first_leaf().prefix)


def _within(node, *types):
    while node is not None:
        if node.type in types:
            return True
        node = node.parent
    return False


class DeleteStatement(Operator):
    """A call whose result is not used, an assignment to a part, or a raise is left out."""

    def mutation_positions(self, node):
        if node.type == "simple_stmt":
            first = node.children[0]
            called = first.type in ("atom_expr", "power") or (
                first.type == "expr_stmt" and first.children[0].type in ("atom_expr", "power")
            )
            if called or first.type == "raise_stmt":
                yield first.start_pos, first.end_pos

    def mutate(self, node, index):
        node.children[0] = _leaf(tree.Name, node.children[0], "pass")
        return node

    @classmethod
    def examples(cls):
        return (Example("os.fsync(file)\n", "pass\n"), Example("raise E\n", "pass\n"))


class ReturnNone(Operator):
    """A function returns nothing."""

    def mutation_positions(self, node):
        if node.type == "return_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.children = [node.children[0], tree.Name("None", node.start_pos, " ")]
        return node

    @classmethod
    def examples(cls):
        return (Example("def f(): return 3\n", "def f(): return None\n"),)


class RemoveKeyword(Operator):
    """A keyword argument of a call is left out; zip's strict only guards what cannot happen."""

    @staticmethod
    def _keywords(node):
        if node.type == "arglist":
            for i, child in enumerate(node.children):
                keyword = child.type == "argument" and child.children[1] == "="
                if keyword and child.children[0].value != "strict":
                    yield i, child

    def mutation_positions(self, node):
        for _, child in self._keywords(node):
            yield child.start_pos, child.end_pos

    def mutate(self, node, index):
        i, _ = list(self._keywords(node))[index]
        first = max(i - 1, 0)  # with the comma before it, or else after it
        del node.children[first : first + 2]
        return node

    @classmethod
    def examples(cls):
        return (Example("f(x, timeout=3)\n", "f(x)\n"),)


class OtherString(Operator):
    """A word of the code, as a mode's or a key's name, is another."""

    WORD = re.compile(r"""^(["'])[\w.:/-]+\1$""")

    def mutation_positions(self, node):
        word = node.type == "string" and self.WORD.match(node.value)
        if word and not _within(node, "raise_stmt") and node.parent.type != "simple_stmt":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        quote = node.value[0]
        others = {"bilinear": "nearest", "nearest": "bilinear", "RGB": "BGR", "BGR": "RGB"}
        word = node.value[1:-1]
        node.value = quote + others.get(word, word + "_") + quote
        return node

    @classmethod
    def examples(cls):
        return (Example("x = 'bilinear'", "x = 'nearest'"),)


class SwapItems(Operator):
    """Two neighbours of a list, a tuple or a call's arguments change places, where that matters."""

    @staticmethod
    def _pairs(node):
        called = node.parent and node.parent.get_previous_sibling()
        if node.type == "arglist" and called and called.get_code().strip() in ("max", "min"):
            return
        if node.type in ("testlist_comp", "arglist", "testlist_star_expr"):
            children = node.children
            for i in range(0, len(children) - 2, 2):
                pair = children[i], children[i + 2]
                if any(x.type in ("argument", "star_expr", "sync_comp_for") for x in pair):
                    return
                if children[i + 1] == "," and pair[0].get_code() != pair[1].get_code():
                    yield i

    def mutation_positions(self, node):
        for i in self._pairs(node):
            yield node.children[i].start_pos, node.children[i + 2].end_pos

    def mutate(self, node, index):
        i = list(self._pairs(node))[index]
        first, second = node.children[i].get_first_leaf(), node.children[i + 2].get_first_leaf()
        first.prefix, second.prefix = second.prefix, first.prefix
        node.children[i], node.children[i + 2] = node.children[i + 2], node.children[i]
        return node

    @classmethod
    def examples(cls):
        return (Example("x = [1, 2]", "x = [2, 1]"), Example("f(a, b)", "f(b, a)"))


class ScaleNumber(Operator):
    """A tolerance is a thousand times wider; a larger number is one and a half times as large."""

    def mutation_positions(self, node):
        if node.type == "number" and re.fullmatch(r"[\d_]*\.[\d_]*|[\d_.]+e[+-]?\d+", node.value):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        number = float(node.value)
        return _leaf(tree.Number, node, repr(number * 1000 if abs(number) < 0.01 else number * 1.5))

    @classmethod
    def examples(cls):
        return (Example("x = 1e-5", "x = 0.01"),)


class RemoveContext(Operator):
    """A ``with`` that binds no name, such as a lock, is left out."""

    def mutation_positions(self, node):
        if node.type == "with_stmt" and not any(x.type == "with_item" for x in node.children):
            yield node.start_pos, node.children[-2].end_pos

    def mutate(self, node, index):
        leading = node.get_first_leaf().prefix
        test = parso.parse("if True:\n    pass\n").children[0]
        test.get_first_leaf().prefix = leading
        test.children[-1] = node.children[-1]
        test.children[-1].parent = test
        return test

    @classmethod
    def examples(cls):
        return (Example("with lock:\n    f()\n", "if True:\n    f()\n"),)


OPERATORS = (
    DeleteStatement,
    ReturnNone,
    RemoveKeyword,
    OtherString,
    SwapItems,
    ScaleNumber,
    RemoveContext,
)
