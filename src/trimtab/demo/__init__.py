"""The bundled model and rows that `trimtab demo` runs on, offline."""
