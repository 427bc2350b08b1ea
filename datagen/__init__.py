"""Mass production of labelled multi-view heads as WebDataset shards."""
