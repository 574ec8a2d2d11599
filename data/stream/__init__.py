"""From shards to the steps of one rank: corpus, plan, packs, batches."""
