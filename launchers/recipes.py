"""`moetune recipes`: what is shipped, for which hardware; and the text of one, to copy from."""

import argparse

from finetune.settings.recipes import recipe_names
from finetune.settings.shipped import recipe_text, shipped_recipes

EXAMPLE = """\
  moetune recipes
  moetune recipes documents > my-documents.yaml"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="print the file of this recipe; without: list them all")


def run(args: argparse.Namespace) -> int:
    """Print one recipe, or a line for each."""
    if args.name is not None:
        if args.name not in recipe_names():
            raise ValueError(f"{args.name!r} is not a shipped recipe. Shipped: {', '.join(recipe_names())}")
        print(recipe_text(args.name), end="")
        return 0
    recipes = shipped_recipes()
    widths = [max(len(recipe.name) for recipe in recipes), max(len(recipe.hardware) for recipe in recipes)]
    for recipe in recipes:
        print(f"{recipe.name:<{widths[0]}}  {recipe.hardware:<{widths[1]}}  {recipe.purpose}")
    print("\nCopy one:     moetune recipes NAME > my-recipe.yaml\nOr make one:  moetune init")
    return 0
