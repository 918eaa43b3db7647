"""What a judge is asked, what its replies mean, and what may be made of them. Pure: nobody is asked from here.

An `Ask` is whatever answers texts with replies: `actors.roles.judge.Judge` over HTTP, a function in a test.

    rubrics     the texts that a judge is given, one file each
    replies     what a reply says; unparsed and refused are values of their own and never a tie
    pairwise    comparisons in both orders
    cache       replies by what was asked, in a file
    labels      AI feedback: canaries, labels that both orders agree on, and what goes to people
"""
