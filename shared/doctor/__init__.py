"""Checks of files that others wrote: nothing in them is executed, nothing in them is believed."""
