"""`moetune recipes`: list the shipped recipes with their hardware, or print one to copy from."""

import argparse

from finetune.settings.recipes import recipe_names
from finetune.settings.shipped import recipe_text, shipped_recipes

EXAMPLE = """\
  moetune recipes
  moetune recipes documents > my-documents.yaml"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="print this recipe's file (default: list all recipes)")


def run(args: argparse.Namespace) -> int:
    """Print one recipe, or one line per recipe."""
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
