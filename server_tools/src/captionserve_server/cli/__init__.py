"""The `captionserve` command: parsing and printing only."""
