"The competition's tables: round trips, and every way in which a file may be wrong."
import warnings

import numpy as np
import pandas as pd
import pytest

from mscan.rsna import (CELLS, CONDITIONS, GRADES, LEVELS, PROBS, TableError, check_probabilities, csv_condition, csv_level,
                        discover_images, discover_studies, read_coordinates, read_descriptions, read_submission, read_train,
                        row_ids, split_row_ids, tidy_condition, tidy_level, write_submission, write_train)

HEADER = ','.join(('study_id', *CELLS))
NORMAL = ',Normal/Mild' * 25


def write(path, *lines):
    path.write_text('\n'.join(lines) + '\n')
    return path


def uniform(*studies): return pd.DataFrame({'row_id': row_ids(studies), **{p: 1 / 3 for p in PROBS}})


def test_order_of_the_sample():
    ids = row_ids(['5'])
    groups = ['left_neural_foraminal_narrowing', 'left_subarticular_stenosis', 'right_neural_foraminal_narrowing',
              'right_subarticular_stenosis', 'spinal_canal_stenosis']
    assert ids == [f'5_{g}_{l}' for g in groups for l in ('l1_l2', 'l2_l3', 'l3_l4', 'l4_l5', 'l5_s1')]


def test_spelling_both_ways():
    assert csv_condition('left_neural_foraminal_narrowing') == 'Left Neural Foraminal Narrowing'
    assert [csv_level(l) for l in LEVELS] == ['L1/L2', 'L2/L3', 'L3/L4', 'L4/L5', 'L5/S1']
    assert [tidy_condition(csv_condition(c)) for c in CONDITIONS] == list(CONDITIONS)
    assert [tidy_level(csv_level(l)) for l in LEVELS] == list(LEVELS)
    for word in ('Spinal Canal Stenosis', 'spinal', ''):
        with pytest.raises(TableError): csv_condition(word)


def test_row_ids_split_from_the_right():
    parts = split_row_ids(['a_b_spinal_canal_stenosis_l1_l2'])  # an id may hold underscores
    assert parts.iloc[0].tolist() == ['a_b', 'spinal_canal_stenosis', 'l1_l2']
    for bad in ('spinal_canal_stenosis_l1_l2', '7_spinal_canal_stenosis_l1_l3', '7_canal_l1_l2', '', '7_spinal_canal_stenosis_l1_l2 '):
        with pytest.raises(TableError, match='row 2'): split_row_ids([*row_ids(['7'])[:1], bad])


@pytest.mark.parametrize('seed', range(3))
def test_train_round_trip_keeps_missing_missing(tmp_path, seed):
    rng = np.random.default_rng(seed)
    studies = [str(s) for s in rng.choice(10**9, 6, replace=False)]
    labels = pd.DataFrame([(s, c, l) for s in studies for c in CONDITIONS for l in LEVELS], columns=['study_id', 'condition', 'level'])
    labels['grade'] = pd.array(rng.integers(0, 3, len(labels)), dtype='Int8')
    labels.loc[rng.random(len(labels)) < .2, 'grade'] = pd.NA
    write_train(labels.sample(frac=1, random_state=seed).sort_values('study_id', key=lambda s: s.map(studies.index), kind='stable'), tmp_path/'t.csv')
    back = read_train(tmp_path/'t.csv')
    pd.testing.assert_frame_equal(back, labels.astype({c: 'str' for c in ('study_id', 'condition', 'level')}))
    raw = pd.read_csv(tmp_path/'t.csv', dtype=str)
    assert list(raw.columns) == HEADER.split(',') and raw.iloc[:, 1:].isna().sum().sum() == labels.grade.isna().sum()
    one = labels.dropna().iloc[0]
    assert raw.set_index('study_id').loc[one.study_id, f'{one.condition}_{one.level}'] == GRADES[one.grade]


def test_train_after_a_spreadsheet(tmp_path):
    path = write(tmp_path/'t.csv', '\ufeff' + HEADER, f'7.0{NORMAL}', f'9{NORMAL}', f'9{NORMAL}', ',' * 25, '', ',' * 25)
    with pytest.warns(UserWarning) as caught: labels = read_train(path)
    assert sorted(str(w.message) for w in caught) == ['t.csv: 1 repeated lines left out (study)', 't.csv: 3 blank rows left out']
    assert labels.study_id.unique().tolist() == ['7', '9'] and len(labels) == 50


@pytest.mark.parametrize('lines, said', [
    ((HEADER, f'7{NORMAL}', f'8,severe{",Normal/Mild" * 24}'), r"line 3: column spinal_canal_stenosis_l1_l2 has the unknown grade 'severe'"),
    ((HEADER, f'7{NORMAL}', f'7,Severe{",Normal/Mild" * 24}'), r"line 3: study has a second, different line: '7'"),
    ((HEADER, f'{NORMAL}'), 'line 2: study_id is empty'),
    (('study_id,spinal_canal_stenosis_l1_l2', '7,Severe'), 'lacks the columns'),
    ((HEADER, f'7{NORMAL},x,y'), 'line 2: more fields'),
    ((HEADER, f'7{NORMAL}', f'8{NORMAL},x'), 'not a readable CSV'),
    (('',), 'lacks|not a readable'),
])
def test_train_refuses_with_the_line(tmp_path, lines, said):
    with pytest.raises(TableError, match=said): read_train(write(tmp_path/'t.csv', *lines))


def test_missing_and_empty_files(tmp_path):
    (tmp_path/'zero.csv').write_bytes(b'')
    (tmp_path/'binary.csv').write_bytes(bytes(range(256)) * 4)
    for reader in (read_train, read_coordinates, read_descriptions, read_submission):
        for name, said in (('none.csv', 'no such file'), ('zero.csv', 'not a readable CSV'), ('binary.csv', 'binary.csv')):
            with pytest.raises(TableError, match=said): reader(tmp_path/name)
    header_only = read_train(write(tmp_path/'h.csv', HEADER))
    assert len(header_only) == 0 and list(header_only) == ['study_id', 'condition', 'level', 'grade']


def test_write_train_refuses_what_it_could_not_read_back(tmp_path):
    rows = [('7', CONDITIONS[0], LEVELS[0], 1)]
    make = lambda r: pd.DataFrame(r, columns=['study_id', 'condition', 'level', 'grade'])
    for bad in (rows + rows, [('7', 'canal', LEVELS[0], 1)], [('7', CONDITIONS[0], LEVELS[0], 3)]):
        with pytest.raises(TableError): write_train(make(bad), tmp_path/'t.csv')
    assert not (tmp_path/'t.csv').exists()


POINT = 'study_id,series_id,instance_number,condition,level,x,y'


def test_coordinates(tmp_path):
    line = '7,70,12,Spinal Canal Stenosis,L3/L4,1.5,2.25'
    path = write(tmp_path/'c.csv', POINT, line, line, '7,70,13,Right Subarticular Stenosis,L5/S1,3,4', ',,,,,,')
    with pytest.warns(UserWarning) as caught: points = read_coordinates(path)
    assert len(caught) == 2 and len(points) == 2
    assert points.iloc[0].tolist() == ['7', '70', 12, 'spinal_canal_stenosis', 'l3_l4', 1.5, 2.25]
    assert points.instance_number.dtype == int and points.x.dtype == float
    for bad, said in (('7,70,12,Spinal Canal,L3/L4,1,2', "unknown condition 'Spinal Canal'"), ('7,70,12,Spinal Canal Stenosis,L3/L5,1,2', "level 'L3/L5'"),
                      ('7,70,1.5,Spinal Canal Stenosis,L3/L4,1,2', 'instance_number'), ('7,70,12,Spinal Canal Stenosis,L3/L4,,2', 'x is not a number'),
                      ('7,70,12,Spinal Canal Stenosis,L3/L4,1,inf', 'y is not a number'), ('7,,12,Spinal Canal Stenosis,L3/L4,1,2', 'series_id is empty')):
        with pytest.raises(TableError, match=f'line 3.*{said}'): read_coordinates(write(tmp_path/'b.csv', POINT, line, bad))


def test_descriptions_never_sink_a_run(tmp_path):
    path = write(tmp_path/'d.csv', 'study_id,series_id,series_description', '7,1,Sagittal T1', '7,2, Sagittal T2/STIR ', '7,3,Axial T2',
                 '7,3,Sagittal T1', '7,4,', '7,5,Localizer', ',,')
    with pytest.warns(UserWarning) as caught: series = read_descriptions(path)
    assert series.view.tolist() == ['sagittal_t1', 'sagittal_t2', 'axial_t2'] and len(caught) == 3
    assert '2 series with an unknown description left out: (empty), Localizer' in ' '.join(str(w.message) for w in caught)


def test_submission_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    frame = uniform('9', '7')
    frame[list(PROBS)] = rng.dirichlet((1, 1, 1), len(frame))
    write_submission(frame.assign(source='model'), tmp_path/'s.csv')
    assert (tmp_path/'s.csv').read_text().splitlines()[0] == 'row_id,normal_mild,moderate,severe'
    back = read_submission(tmp_path/'s.csv')
    assert back.row_id.tolist() == frame.row_id.tolist() and (back[list(PROBS)].to_numpy() == frame[list(PROBS)].to_numpy()).all()
    assert back.study_id.tolist() == ['9'] * 25 + ['7'] * 25
    assert [f.name for f in tmp_path.iterdir()] == ['s.csv']  # nothing half written is left


@pytest.mark.parametrize('values, said', [
    (('', '.5', '.5'), 'normal_mild is not a number'), (('x', '.5', '.5'), "not a number: 'x'"), (('inf', '0', '0'), 'finite|outside'),
    (('nan', '0', '1'), 'not a number'), (('1.2', '-.2', '0'), 'outside'), (('.4', '.4', '.4'), 'do not sum to 1: 0.4, 0.4, 0.4'),
    (('.3', '.3', '.3989'), 'do not sum to 1'),
])
def test_submission_refuses_with_the_row(tmp_path, values, said):
    first, second = row_ids(['7'])[:2]
    path = write(tmp_path/'s.csv', 'row_id,normal_mild,moderate,severe', f'{first},1,0,0', f'{second},{",".join(values)}')
    with pytest.raises(TableError, match=said) as error: read_submission(path)
    assert 'line 3' in str(error.value) or ('row 2' in str(error.value) and second in str(error.value))


def test_submission_refuses_repeats_holes_and_strangers(tmp_path):
    head, row = 'row_id,normal_mild,moderate,severe', f'{row_ids(["7"])[0]},1,0,0'
    for lines, said in (((head, row, row), 'line 3.*there twice'), ((head, row, ',,,'), 'blank'), ((head, row, ',1,0,0'), 'row_id is empty'),
                        ((head, row, '7_x_l1_l2,1,0,0'), 'row 2'), (('row_id,normal_mild,moderate', row[:-2]), 'lacks the column severe')):
        with pytest.raises(TableError, match=said): read_submission(write(tmp_path/'s.csv', *lines))
    with pytest.raises(TableError): write_submission(uniform('7').assign(severe=np.nan), tmp_path/'n.csv')
    with pytest.raises(TableError): write_submission(pd.concat([uniform('7')] * 2), tmp_path/'n.csv')
    assert not (tmp_path/'n.csv').exists()
    check_probabilities(uniform('7').assign(severe=1 / 3 + 9e-4))  # three rounded decimals pass


def test_folders_are_the_truth(tmp_path):
    for name in ('train_images/100/7', 'train_images/100/30', 'train_images/20/1', 'train_images/.hidden/1', 'train_images/__MACOSX/1', 'train_images/5'):
        (tmp_path/name).mkdir(parents=True)
    (tmp_path/'train_images/note.txt').touch(), (tmp_path/'train_images/20/1/1.dcm').touch(), (tmp_path/'train_images/20/x.dcm').touch()
    found = discover_images(tmp_path, 'train')
    assert list(zip(found.study_id, found.series_id)) == [('20', '1'), ('100', '7'), ('100', '30')]
    assert discover_studies(tmp_path, 'train') == ['5', '20', '100']  # 5 is empty, and yet a study
    with pytest.raises(TableError, match='test_images'): discover_images(tmp_path, 'test')


def test_reading_a_clean_table_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(read_train(write(tmp_path/'t.csv', HEADER, f'7{NORMAL}'))) == 25
        assert len(read_descriptions(write(tmp_path/'d.csv', 'study_id,series_id,series_description', '7,1,Axial T2'))) == 1
