"""Captions of many images: from whatever they lie in, to a table, once each, through interruptions.

sources     files, folders, lists, tables, tar shards, data sets: one item after the other
captioners  who captions: services, or a model repository in this process
run         reads ahead, captions, and keeps what has become of each item
journal     what has become of each item so far, on disk
outputs     the table that comes of it; sidecars beside the images
parts       tables in batches of rows, each of which becomes one file
on_ray      the actors of a Ray cluster, who make parts
"""
