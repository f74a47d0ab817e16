"""TextCraft: craft a Minecraft item from the recipes in the prompt; its expert and its demonstrations."""

from jaxprm.environments.textcraft.environment import TextCraft

__all__ = ["TextCraft"]
