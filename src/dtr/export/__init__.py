"""Hybrids as stock architectures, so that servers run them without our code. The entry is `exporter.export_hybrid`."""
