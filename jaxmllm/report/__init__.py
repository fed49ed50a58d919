"""Results for eyes and for programs: TensorBoard, tables, figures."""
