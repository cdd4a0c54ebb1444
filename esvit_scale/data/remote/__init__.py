"""Shard sets in object stores, read through a cache on the node's own disk.

    place.py       opens a set by its URL: its manifest comes first, into the set's folder in the cache
    store.py       one request at a time: retries, back-off, bounds on requests, and which failures are the user's
    locks.py       locks on single shards that end with the process that holds them
    room.py        the size limit: what lies in the cache, and what leaves first
    shard_cache.py fetches a shard, compares it with the manifest's sha256, and keeps it while it is needed
    schedule.py    when the order of the data needs which shard on a node, and how much room that takes
    ahead.py       fetches shards before they are needed
    working_set.py the room that a run needs, said before it starts
    ranges.py, range_ahead.py, range_reader.py, ring.py
                   where the cache has no room for whole shards: single samples, verified one by one
    upload.py      sends a finished set to a store, its manifest last
    outbox.py      sends the shards of a set while it is written, which any machine can continue
    source_files.py  archives and tables that a shard set is made of, fetched to this machine once
    url_files.py   single images that a list or table names by URL

A shard set's files in the cache have the names that they have in the store, so that everything that reads a folder of
shards reads the cache. Nothing else in the package knows URLs of stores.
"""
