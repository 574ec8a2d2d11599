"""Recipes: YAML only. One file is one runnable run; `finetune.config` finds them by name."""
