"""Parts of the built-in head: the sculpted surface, its mesh, eyes, mouth, ears, skinning and components."""
