"""Records as pictures: what is shown of each kind, how it is drawn, and the page that holds it."""
